"""BitCPM: products with packed ternary weights."""
