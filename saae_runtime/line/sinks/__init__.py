"""Where records go: files, SQLite, MQTT, webhooks."""
