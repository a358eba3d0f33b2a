"""Taking a tuned model away: PEFT's folder, merged safetensors, GGUF; each checked before it is handed over."""
