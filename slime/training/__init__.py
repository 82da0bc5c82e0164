"""From examples to learned rows."""
