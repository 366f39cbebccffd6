from .compare import run_compare as run_compare
from .options import BenchConfig as BenchConfig
from .options import CompareConfig as CompareConfig
from .options import ReportConfig as ReportConfig
from .options import TuneConfig as TuneConfig
from .report import run_report as run_report
from .run import run_bench as run_bench
from .run import run_tune as run_tune
