"""Log lines, plain or JSON, and one line a request."""

import logging
import time
from typing import Any, Final

import orjson

from app.settings import Settings

# What every LogRecord has; anything else was given by the caller and belongs into the line.
_OWN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
LOUD: Final = ("PIL", "matplotlib", "asyncio", "httpx", "httpcore", "uvicorn.access")


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`; a traceback goes into one field."""
        line: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update({key: value for key, value in vars(record).items() if key not in _OWN})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class PlainFormatter(logging.Formatter):
    """Time, level and sentence, and of a request its ids."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The line of `record`, with what finds the request again behind it."""
        line = super().format(record)
        found = [(name, getattr(record, name, None)) for name in ("request_id", "trace_id")]
        return " ".join([line, *(f"{name}={value}" for name, value in found if value)])


def configure_logging(settings: Settings) -> None:
    """Send the process's log to standard error in the form that the settings say."""
    formatter = JsonFormatter() if settings.log_format == "json" else PlainFormatter()
    formatter.converter = time.gmtime
    output = logging.StreamHandler()
    output.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [output]
    root.setLevel(settings.log_level.upper())
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
