"""What every section of the settings is made from."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the settings; frozen, and strict about unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
