"""The line over HTTP: judging, triggers, recipes, thresholds, overrides, health, and the operator's page."""
