"""Found parts: their maps, and what becomes of them."""
