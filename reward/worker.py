"""A process that scores. Started as a script by `rollout/scoring.py` or `python -m reward`; ends with its input.

Not multiprocessing: that would run the user's script again in every worker where it has no `__main__` guard. First
comes (module path, reward config, data type), then one (text, task, truncated) after the other, all pickled; each is
answered by ("score", Score), or ("user_error" or "error", text).
"""

import os
import pickle
import signal
import sys
import traceback
from pathlib import Path


def serve() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt from the keyboard is the parent's business
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a reward function prints must not be taken for an answer
    sys.path[:], reward, data_type = pickle.loads(pickle.load(requests))
    from common.errors import UserError
    from reward.score import make_scorer

    scorer = make_scorer(reward, data_type)
    while True:
        try:
            text, task, truncated = pickle.load(requests)
        except EOFError:
            return
        try:
            answer = ("score", scorer(text, task, truncated))
        except UserError as error:
            answer = ("user_error", str(error))
        except Exception:  # a reward function of the user's may raise anything; the parent raises it again
            answer = ("error", traceback.format_exc())
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    # Pickles name the project's modules, and no file in this folder may stand in for a library.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    serve()
