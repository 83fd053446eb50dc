from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from hubdiff.devhub import DevHub


def test_a_collection_is_made_filled_and_read(alice: HfApi, stranger: HfApi, repo: str) -> None:
    made = alice.create_collection(f"A Family: {repo}", namespace="team", description="Bases")
    assert made.slug.startswith("team/a-family-alice-judged-")
    alice.add_collection_item(made.slug, repo, "model", note="the first")
    alice.create_repo(f"{repo}-data", repo_type="dataset")
    alice.add_collection_item(made.slug, f"{repo}-data", "dataset")
    shown = stranger.get_collection(made.slug)
    assert (shown.title, shown.description, shown.private) == (made.title, "Bases", False)
    assert [(item.item_id, item.item_type, item.note) for item in shown.items] == [
        (repo, "model", "the first"),
        (f"{repo}-data", "dataset", None),
    ]
    assert [item.position for item in shown.items] == [0, 1]
    assert shown.last_updated >= made.last_updated


def test_twice_is_a_conflict_unless_that_is_fine(alice: HfApi, repo: str) -> None:
    made = alice.create_collection(repo)
    assert alice.create_collection(repo, exists_ok=True).slug == made.slug
    alice.add_collection_item(made.slug, repo, "model")
    assert len(alice.add_collection_item(made.slug, repo, "model", exists_ok=True).items) == 1
    for action in (
        lambda: alice.create_collection(repo),
        lambda: alice.add_collection_item(made.slug, repo, "model"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            action()
        assert error.value.response.status_code == 409


def test_only_members_change_it_and_only_what_is_there_goes_in(
    alice: HfApi, bob: HfApi, repo: str
) -> None:
    made = alice.create_collection(repo)
    refused = [
        (bob.create_collection, ("x", {"namespace": "team"}), 403),
        (bob.add_collection_item, (made.slug, repo, "model"), 403),
        (alice.add_collection_item, (made.slug, "alice/not-there", "model"), 404),
        (alice.get_collection, ("alice/not-there-0123",), 404),
    ]
    for action, arguments, status in refused:
        options = arguments[-1] if isinstance(arguments[-1], dict) else {}
        plain = arguments[:-1] if options else arguments
        with pytest.raises(HfHubHTTPError) as error:
            action(*plain, **options)  # type: ignore[operator]
        assert error.value.response.status_code == status


def test_private_ones_and_private_items_are_hidden(alice: HfApi, bob: HfApi, repo: str) -> None:
    secret = alice.create_collection(f"secret {repo}", private=True)
    assert alice.get_collection(secret.slug).private
    with pytest.raises(HfHubHTTPError):
        bob.get_collection(secret.slug)
    alice.create_repo(f"{repo}-private", private=True)
    shown = alice.create_collection(f"shown {repo}")
    alice.add_collection_item(shown.slug, f"{repo}-private", "model")
    assert len(alice.get_collection(shown.slug).items) == 1
    assert bob.get_collection(shown.slug).items == []


def test_it_is_kept_in_the_folder(tmp_path: Path) -> None:
    with DevHub(tmp_path) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token())
        api.create_repo("demo/x")
        slug = api.create_collection("Kept").slug
        api.add_collection_item(slug, "demo/x", "model")
    with DevHub(tmp_path) as hub:
        api = HfApi(endpoint=hub.url, token=hub.token())
        assert [item.item_id for item in api.get_collection(slug).items] == ["demo/x"]
