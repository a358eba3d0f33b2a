"""Projects, API keys and quotas."""
