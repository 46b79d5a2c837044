"""JSON that somebody else wrote: whatever is wrong with it is a ValueError with a short reason.

`json.loads` has three more ways to fail than its documentation suggests: nesting beyond the interpreter's stack,
integers of thousands of digits, and bytes that are not UTF-8. Imports no torch.
"""

from __future__ import annotations

import json
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError saying what is wrong and where."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not JSON: {error.msg} at {line}column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    except ValueError:  # what is left is int(), which refuses more than 4300 digits
        raise ValueError("not JSON that can be read: a number has too many digits") from None
