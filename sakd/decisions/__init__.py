"""What spot modes decided, as numbers, as text and as pictures. It looks at records and never trains."""

from sakd.decisions.chosen import Chosen, choose
from sakd.decisions.looked import AtSpot, look
from sakd.decisions.recorded import Record, Recorded, Seen, keeps_all
from sakd.decisions.together import Together, beside

__all__ = [
    "AtSpot",
    "Chosen",
    "Record",
    "Recorded",
    "Seen",
    "Together",
    "beside",
    "choose",
    "keeps_all",
    "look",
]
