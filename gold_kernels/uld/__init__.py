"""Universal logit distillation between two vocabularies: plain, extended and hybrid."""
