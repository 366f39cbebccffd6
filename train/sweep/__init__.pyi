from .grid import sweep as sweep
from .options import SweepConfig as SweepConfig
from .result import SweepPoint as SweepPoint
from .result import SweepResult as SweepResult
from .result import sweep_table as sweep_table
