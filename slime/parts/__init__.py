"""Part maps, and masks, regions, drawings and metrics made from them."""
