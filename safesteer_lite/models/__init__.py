"""The only place that knows transformers, peft, bitsandbytes and unsloth."""
