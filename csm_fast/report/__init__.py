"""What a run leaves for people to read: metrics.jsonl and the summary. Never imports ``train``."""
