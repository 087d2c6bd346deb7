"""Model Wind Tunnel 2.0: train many tiny models, predict the large one, and check the prediction on runs held out.

In the order of use: `candidate` (a model of the tunnel), `coordinates` (does muP hold?), `plan`, `tasks`, `one_run`,
`runner` and `cluster` (the sweep), `law` (loss from size and tokens), `scaling_bench`, `scoring` and `sigmoid` (task
score from loss), `search` (the cheapest model for a score), `record` (what was measured).
"""

from minicpm_ref.wind_tunnel.candidate import Candidate, multiplied_parameters, training_flops
from minicpm_ref.wind_tunnel.law import FittedLaw, Law, Run, bootstrap_law, fit_law
from minicpm_ref.wind_tunnel.runner import Outcome, run_tasks
from minicpm_ref.wind_tunnel.scaling_bench import Question, make_questions
from minicpm_ref.wind_tunnel.scoring import answer, solution_bytes
from minicpm_ref.wind_tunnel.search import Costs, Infeasible, Limits, Plan, cheapest, cheapest_for_score
from minicpm_ref.wind_tunnel.sigmoid import FittedSigmoid, Scored, Sigmoid, bootstrap_sigmoid, fit_sigmoid
from minicpm_ref.wind_tunnel.tasks import Task

__all__ = [
    "Candidate",
    "Costs",
    "FittedLaw",
    "FittedSigmoid",
    "Infeasible",
    "Law",
    "Limits",
    "Outcome",
    "Plan",
    "Question",
    "Run",
    "Scored",
    "Sigmoid",
    "Task",
    "answer",
    "bootstrap_law",
    "bootstrap_sigmoid",
    "cheapest",
    "cheapest_for_score",
    "fit_law",
    "fit_sigmoid",
    "make_questions",
    "multiplied_parameters",
    "run_tasks",
    "solution_bytes",
    "training_flops",
]
