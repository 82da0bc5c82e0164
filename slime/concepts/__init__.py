"""Learn concepts: text tokens by which a frozen promptable detector (SAM3) finds the parts of an example."""
