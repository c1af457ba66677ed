"""Google's API on the port that is given: gcp-storage-emulator, and what TensorStore asks beyond it.

That is the generation of what is downloaded, and requests that hold only for one generation.
"""

import sys
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects


def conditional(handler, sends):
    def handle(request, response, storage, *args, **kwargs):
        name = request.query["name"][0] if sends else request.params["object_id"]
        try:
            found = storage.get_file_obj(request.params["bucket_name"], name)["generation"]
        except NotFound:
            found = "0"
        wanted = request.query.get("ifGenerationMatch", [found])[0]
        known = request.query.get("ifGenerationNotMatch", [None])[0]
        if wanted != found or known == found:
            _ = request.data if sends else None
            failed = wanted != found or sends
            response.status = HTTPStatus.PRECONDITION_FAILED if failed else HTTPStatus.NOT_MODIFIED
            return
        response["x-goog-generation"] = found
        handler(request, response, storage, *args, **kwargs)

    return handle


PLAIN, CHECKED = objects.insert, conditional(objects.insert, sends=True)


def insert(request, *args):
    return (CHECKED if "name" in request.query else PLAIN)(request, *args)


objects.download = conditional(objects.download, sends=False)
objects.insert = insert
# its table of routes is made when it is imported
from gcp_storage_emulator.server import create_server  # noqa: E402

create_server("localhost", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
