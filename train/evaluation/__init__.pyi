from .options import EvalConfig as EvalConfig
from .report import evaluate as evaluate
from .scoring import Request as Request
from .scoring import Scorer as Scorer
from .scoring import TokenScores as TokenScores
