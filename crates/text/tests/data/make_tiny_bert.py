"""Makes tiny-bert/: a BertForMaskedLM of a thousand parameters, saved the way that older Hub checkpoints are.

Needs torch and transformers; `made_with` in expected.json names the versions last used. PyTorch's own pickle keeps
the fixture honest: TensorFlow's LayerNorm names, the integer buffer, the tied output matrix under its second name, and
the head of next-sentence prediction, which this class does not have.
"""

import json
from pathlib import Path

import torch
import transformers

FOLDER = Path(__file__).parent / "tiny-bert"
IDS = [[1, 5, 18, 2], [1, 7, 2, 0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0]]

torch.manual_seed(0)
config = transformers.BertConfig(vocab_size=19, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=12, max_position_embeddings=10)
model = transformers.BertForMaskedLM(config).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    logits = model(input_ids=torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits

state = {}
for name, value in model.state_dict().items():
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    if name != "cls.predictions.decoder.bias":
        state[name] = value
state["bert.embeddings.position_ids"] = torch.arange(config.max_position_embeddings).unsqueeze(0)
state["bert.pooler.dense.weight"], state["bert.pooler.dense.bias"] = torch.randn(8, 8), torch.randn(8)
state["cls.seq_relationship.weight"], state["cls.seq_relationship.bias"] = torch.randn(2, 8), torch.randn(2)

FOLDER.mkdir(exist_ok=True)
torch.save(state, FOLDER / "pytorch_model.bin")
config.architectures = ["BertForMaskedLM"]
(FOLDER / "config.json").write_text(config.to_json_string())
expected = {
    "made_with": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
    "input_ids": IDS, "attention_mask": MASK, "logits": logits.tolist(),
}
(FOLDER / "expected.json").write_text(json.dumps(expected) + "\n")
