// The official JavaScript client against the loopback Hub: uploads, lists and downloads.
// Usage: node judge.mjs HUB_URL TOKEN REPO xet|lfs. Prints one JSON object; throws on any surprise.
import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import * as hub from "@huggingface/hub";

const [hubUrl, accessToken, name, transport] = process.argv.slice(2);
const repo = { type: "model", name };
const common = { repo, hubUrl, accessToken };
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

const me = await hub.whoAmI({ hubUrl, accessToken });
assert.equal(me.name, "alice");

await hub.createRepo(common);
assert.equal(await hub.repoExists(common), true);
await assert.rejects(hub.createRepo(common), { statusCode: 409 });

const small = new TextEncoder().encode("---\ntags: [from-js]\n---\n# hello\n");
const large = randomBytes(2_500_000);
const written = await hub.commit({
	...common,
	title: "from JavaScript",
	useXet: transport === "xet",
	operations: [
		{ operation: "addOrUpdate", path: "README.md", content: new Blob([small]) },
		{ operation: "addOrUpdate", path: "deep/er/model.safetensors", content: new Blob([large]) },
	],
});
assert.match(written.commit.oid, /^[0-9a-f]{40}$/);

const listed = {};
for await (const file of hub.listFiles({ ...common, recursive: true })) {
	listed[file.path] = file;
}
assert.equal(listed["deep/er/model.safetensors"].lfs.oid, sha256(large));
assert.equal(listed["deep/er/model.safetensors"].size, large.length);
assert.equal(listed["deep"].type, "directory");

const read = async (path, options = {}) => {
	const blob = await hub.downloadFile({ ...common, path, ...options });
	return blob && Buffer.from(await blob.arrayBuffer());
};
assert.deepEqual(await read("README.md"), Buffer.from(small));
assert.deepEqual(await read("deep/er/model.safetensors"), large);
assert.equal(await read("missing.txt"), null);

const lazy = await hub.downloadFile({ ...common, path: "deep/er/model.safetensors" });
const middle = Buffer.from(await lazy.slice(1_000_000, 1_000_100).arrayBuffer());
assert.deepEqual(middle, large.subarray(1_000_000, 1_000_100));

assert.equal(await hub.fileExists({ ...common, path: "README.md" }), true);
assert.equal(await hub.fileExists({ ...common, path: "missing.txt" }), false);

const model = await hub.modelInfo({ ...common, name, additionalFields: ["tags", "sha"] });
assert.equal(model.sha, written.commit.oid);
assert.ok(model.tags.includes("from-js"));

await hub.createBranch({ ...common, branch: "side/one" });
await hub.uploadFile({ ...common, branch: "side/one", file: { path: "a.txt", content: new Blob(["a"]) } });
assert.equal((await read("a.txt", { revision: "side/one" })).toString(), "a");
assert.equal(await read("a.txt"), null);

const pull = await hub.uploadFile({
	...common,
	isPullRequest: true,
	file: { path: "b.txt", content: new Blob(["b"]) },
});
assert.ok(pull.pullRequestUrl.endsWith("/discussions/1"));
assert.equal((await read("b.txt", { revision: "refs/pr/1" })).toString(), "b");

await hub.deleteFile({ ...common, path: "README.md" });
assert.equal(await hub.fileExists({ ...common, path: "README.md" }), false);

const titles = [];
for await (const commit of hub.listCommits({ ...common, revision: "main" })) {
	titles.push(commit.title);
}
assert.deepEqual(titles.slice(1), ["from JavaScript", "initial commit"]);

const paths = await hub.pathsInfo({ ...common, paths: ["deep/er/model.safetensors"], expand: true });
assert.equal(paths[0].lastCommit.id, written.commit.oid);

await assert.rejects(hub.whoAmI({ hubUrl, accessToken: "hf_wrong" }), { statusCode: 401 });
await assert.rejects(read("README.md", { revision: "nowhere" }), { statusCode: 404 });

const found = [];
for await (const one of hub.listModels({ hubUrl, accessToken, search: { owner: "alice", tags: ["from-js"] } })) {
	found.push(one.name);
}
assert.ok(!found.includes(name), "the README that carried the tag is deleted");

console.log(JSON.stringify({ sha256: sha256(large), commit: written.commit.oid }));
