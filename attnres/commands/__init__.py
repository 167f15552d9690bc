"""The doors: what a person starts."""
