"""Token bytes, alignment of two tokenisations, vocabularies: text, no GPU."""
