"""The transfer lab: fine-tuning, on TRL, transformers and accelerate (the extra ``finetune``)."""
