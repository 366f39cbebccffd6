"""Evaluation of a trained model: bits per byte of texts, multiple choice, the CORE metric, and tasks of lm-eval."""

from .report import EvalConfig, evaluate
from .scoring import Request, Scorer, TokenScores

__all__ = ["EvalConfig", "Request", "Scorer", "TokenScores", "evaluate"]
