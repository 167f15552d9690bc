"""From a judged folder to a page."""
