"""What is printed while lorasweep works."""

import logging

from lorasweep.core.progress import SaidOnce


def test_a_line_of_the_named_loggers_comes_once_and_others_as_often_as_they_are_said():
    said_once = SaidOnce("images")
    lines = ["2 duplicates", "2 duplicates", "3 duplicates"]

    def come_through(logger):
        records = (logging.LogRecord(logger, 30, "", 0, line, (), None) for line in lines)
        return [record.getMessage() for record in records if said_once.filter(record)]

    assert come_through("training") == lines
    assert come_through("images.folder") == ["2 duplicates", "3 duplicates"]
