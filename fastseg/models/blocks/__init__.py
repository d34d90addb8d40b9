"""Parts that networks share, each once."""
