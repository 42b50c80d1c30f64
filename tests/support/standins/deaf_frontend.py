"""The frontend, but a request goes on when its client has left."""

from __future__ import annotations

from frontend.__main__ import main
from frontend.forward import Forward

if __name__ == "__main__":
    Forward.cancel = lambda self: None  # type: ignore[method-assign]  # in this process, for good
    main()
