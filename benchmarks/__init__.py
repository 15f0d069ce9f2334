"""Scripts that print every number this project states, with what it was measured on."""
