"""LitServe as its documentation advises: a `LitAPI` with batching, and the quicker queue.

`python litserve_server.py P|R PORT`
"""

import sys

import litserve as ls
import torch
from computation import Preprocessing, classify, perceptron, resnet


class PerceptronAPI(ls.LitAPI):
    """Takes the JSON of V2, answers `{"logits": [...]}`."""

    def setup(self, device):
        """Once in each worker."""
        self.network = perceptron().to(device)

    def decode_request(self, request):
        """One request to one row."""
        return torch.tensor(request["inputs"][0]["data"], dtype=torch.float32)

    @torch.inference_mode()
    def predict(self, rows):
        """A batch of rows, stacked by LitServe."""
        return self.network(rows)

    def encode_response(self, logits):
        """One row to one answer."""
        return {"logits": logits.tolist()}


class PictureAPI(ls.LitAPI):
    """Takes a form with a file `file`."""

    def setup(self, device):
        """Once in each worker."""
        self.network = resnet().to(device)
        self.preprocess = Preprocessing()

    def decode_request(self, request):
        """One upload to one tensor."""
        return self.preprocess(request["file"].file.read())

    def predict(self, pictures):
        """A batch of pictures, stacked by LitServe."""
        return classify(self.network, pictures)

    def encode_response(self, answer):
        """As it is."""
        return answer


if __name__ == "__main__":
    scenario, port = sys.argv[1:]
    if scenario == "P":
        api = PerceptronAPI(max_batch_size=32, batch_timeout=0.01)
    else:
        api = PictureAPI(max_batch_size=8, batch_timeout=0.01)
    server = ls.LitServer(api, accelerator="cpu", timeout=120, fast_queue=True)
    server.run(host="127.0.0.1", port=int(port), generate_client_file=False, log_level="warning")
