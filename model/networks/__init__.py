"""The networks, readable beside the papers."""
