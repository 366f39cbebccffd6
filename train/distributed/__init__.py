"""The processes of a job, as torchrun starts them, one a GPU: who each is, what they agree on, and how they end together."""

from .agreed_stop import AgreedStop
from .errors import is_first_process, report_error, says_why_it_ends
from .joining import join
from .layout import Layout, check_parallel
from .world import IGNORED_TARGET, World

__all__ = [
    "IGNORED_TARGET",
    "AgreedStop",
    "Layout",
    "World",
    "check_parallel",
    "is_first_process",
    "join",
    "report_error",
    "says_why_it_ends",
]
