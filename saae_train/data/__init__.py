"""Images of a product: reading, splitting, checking, fetching and drawing them."""
