"""The OpenAI-compatible HTTP server. Needs the extra: pip install 'moeforge[serve]'."""
