"""Losses in training: what each needs of a batch, counts and logs. One file a kind, chosen here."""

from gold_trainer.caching.store import form_of_cache
from gold_trainer.config import GOLDConfig
from gold_trainer.objectives.chunk_likelihood import ChunkLikelihood
from gold_trainer.objectives.cross_tokenizer import CrossTokenizer
from gold_trainer.objectives.from_means import FromMeans
from gold_trainer.objectives.from_top_k import FromTopK
from gold_trainer.objectives.objective import Objective
from gold_trainer.objectives.projected_jsd import ProjectedJSD
from gold_trainer.objectives.same_vocabulary import SameVocabulary

__all__ = [
    "ChunkLikelihood",
    "CrossTokenizer",
    "FromMeans",
    "FromTopK",
    "Objective",
    "ProjectedJSD",
    "SameVocabulary",
    "choose_objective",
]


ACROSS_TOKENIZERS: dict[str, type[Objective]] = {
    "uld": CrossTokenizer,
    "chunk_likelihood": ChunkLikelihood,
    "projected_jsd": ProjectedJSD,
}


def choose_objective(args: GOLDConfig) -> type[Objective]:
    """The kind, which checks the pair before weights are read; it is made once they are."""
    if args.use_uld_loss:
        return ACROSS_TOKENIZERS[args.uld_loss_type]
    if args.loss_top_k:
        return FromTopK
    return FromMeans if form_of_cache(args) == "head_means" else SameVocabulary
