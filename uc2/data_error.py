"""The errors for bad input data and for options that cannot be."""


class OptionError(ValueError):
    """An option that cannot be, or that does not go with the others or with what an earlier run left; one sentence."""


class DataError(ValueError):
    """Bad input data, told in one sentence: where it is, what was found and what was expected.

    Args:
        file: the file, directory or data set read.
        row: number of the row, counted from 1 (in JSON Lines: the line number).
        field: the field within the row, dotted for nested ones (`captions.de`).
        found: the offending value; long values are shortened.
        expected: what would have been right, in words.
    """

    def __init__(
        self, *, file=None, row: int | None = None, field: str | None = None, found=None, expected: str = ""
    ):
        self.file, self.row, self.field, self.found, self.expected = file, row, field, found, expected
        place = [str(file)] if file is not None else []
        place += [f"row {row}"] if row is not None else []
        place += [f"field '{field}'"] if field is not None else []
        shown = found if isinstance(found, Found) else shorten(repr(found))
        super().__init__(f"{', '.join(place)}: found {shown}, expected {expected}".removeprefix(": "))

    def __reduce__(self):
        # Keyword-only arguments do not survive the default pickling, and errors must cross process borders.
        arguments = dict(
            file=self.file, row=self.row, field=self.field, found=self.found, expected=self.expected
        )
        return _rebuild_data_error, (arguments,)


class Found(str):
    """Words that describe what was found; `DataError` prints them without quotation marks."""


def _rebuild_data_error(arguments: dict) -> DataError:
    return DataError(**arguments)


def shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
