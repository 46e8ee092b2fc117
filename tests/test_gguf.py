"""Files that are written tensor by tensor: what they say, what is refused, templates in Go's form."""

import json
import shutil
import subprocess

from data.make.nano import CHAT_TEMPLATE, DATA
from ironlogic.data.problems import make_tasks
from ironlogic.export import check_export, export_gguf, export_lora_gguf
from ironlogic.export.gguf import (
    ExportError,
    convert,
    find_quantizer,
    modelfile_text,
    plain_template,
    why_not_gguf,
    write_gguf,
    write_lora_gguf,
)
from ironlogic.export.readers import Llama, gguf_readers, has_llama, llama_answers
from ironlogic.generate import chat_ids, generate
from ironlogic.models import load_model

import gguf
import jinja2
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers.utils.chat_template_utils import render_jinja_template

NANO = DATA / "nano"
GO = shutil.which("go")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(NANO, tmp_path / "model")


def change(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- what is written ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("quantization", "step"), [("f16", 2**-11), ("q8_0", 0.57 / 127)])
def test_every_tensor_and_the_tokenizer_come_back(tmp_path, quantization, step):
    write_gguf(NANO, tmp_path / "x.gguf", quantization=quantization)
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    ours = load_file(NANO / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 4)
    theirs = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    assert len(theirs) == len(ours) == 46
    for key, array in ours.items():
        back = theirs[names.get_name(key, (".weight",))]
        if array.ndim == 1:
            assert np.array_equal(back, array), "norms stay float32"
            continue
        size = np.abs(array.reshape(-1, 32))  # q8_0: 32 weights share a scale, half a step and the scale's rounding
        allowed = step * (size.max(1, keepdims=True) if quantization == "q8_0" else size)
        assert (np.abs(back - array).reshape(-1, 32) <= allowed + 1e-7).all()
    fields = {k: f.contents() for k, f in reader.fields.items()}
    assert fields["qwen3.attention.key_length"] == 128
    assert fields["qwen3.rope.freq_base"] == 10_000
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert kinds[tokens.index("<|im_end|>")] == gguf.TokenType.CONTROL
    assert kinds[tokens.index("<think>")] == gguf.TokenType.USER_DEFINED, "thinking is to be read"
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert fields["tokenizer.chat_template"] == plain_template(CHAT_TEMPLATE)


def test_the_plain_template_renders_the_same():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "greet"},
        {"role": "user", "content": "Bye"},
    ]
    rendered, _ = render_jinja_template([chat], chat_template=CHAT_TEMPLATE, add_generation_prompt=True)
    plain = jinja2.Template(plain_template(CHAT_TEMPLATE))  # knows no generation tag
    assert plain.render(messages=chat, add_generation_prompt=True) == rendered[0]
    with pytest.raises(jinja2.TemplateSyntaxError):
        jinja2.Template(CHAT_TEMPLATE)


def test_qwen2s_way_of_cutting_words_is_known_and_others_are_not(copy):
    assert why_not_gguf(copy) == ""
    rule = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    words = {
        "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    }
    split = {"type": "Split", "pattern": words, "behavior": "Isolated", "invert": False}
    change(copy / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, rule]})
    write_gguf(copy, copy / "x.gguf")
    assert gguf.GGUFReader(copy / "x.gguf").fields["tokenizer.ggml.pre"].contents() == "qwen2"
    split["pattern"] = {"Regex": r"\p{N}{1,3}"}
    change(copy / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, rule]})
    assert "cutting words" in why_not_gguf(copy)


# --- what is refused ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM, not a dense Qwen3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rotary"),
        ({"use_sliding_window": True}, "sliding"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_what_it_does_not_know_is_refused(copy, fields, reason):
    change(copy / "config.json", **fields)
    with pytest.raises(ExportError, match=reason):
        write_gguf(copy, copy / "x.gguf")


@pytest.mark.parametrize(("value", "message"), [(70_000, "up_proj.*beyond the range"), (np.nan, "not finite")])
def test_weights_beyond_float16_are_refused_not_turned_into_infinity(copy, value, message):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = value
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match=message):
        write_gguf(copy, copy / "x.gguf")


def test_adapters_with_more_than_pairs_are_refused(tmp_path):
    with pytest.raises(ExportError, match="no .safetensors file"):
        write_lora_gguf(tmp_path, NANO, tmp_path / "x.gguf")
    save_file({"base_model.model.model.norm.weight": np.ones(128, np.float32)}, tmp_path / "a.safetensors")
    for settings, message in (
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({}, "no low-rank pair"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, **settings}))
        with pytest.raises(ExportError, match=message):
            write_lora_gguf(tmp_path, NANO, tmp_path / "x.gguf")


# --- Ollama ------------------------------------------------------------------------------------------------
GEMMA = (  # in the manner of Gemma 3: the system text stands at the head of the first user turn
    "{{ bos_token }}{%- set first = '' -%}{%- set rest = messages -%}"
    "{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- endif -%}"
    "{%- for m in rest -%}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (first if loop.first else '') + m.content + '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
TALKS = [["user"], ["user", "assistant", "user"], ["system", "user"], ["system", "user", "assistant", "user"]]


class Renders:
    """As much of a tokenizer as a template needs."""

    def __init__(self, template):
        self.template, self.bos_token = jinja2.Template(plain_template(template)), "<bos>"

    def apply_chat_template(self, chat, tokenize, **options):
        return self.template.render(messages=chat, bos_token=self.bos_token, **options)


def go_template(template):
    text = modelfile_text("x.gguf", Renders(template), stops=["<end>"], system="Be kind.")
    assert text.endswith('"""\nPARAMETER stop "<end>"\nSYSTEM """Be kind."""\n')
    return text.partition('TEMPLATE """')[2].partition('"""')[0]


@pytest.mark.slow  # Go compiles its library first
@pytest.mark.skipif(GO is None, reason="no Go on this machine (its text/template is the judge here)")
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GEMMA], ids=["nano", "gemma"])
def test_go_renders_what_jinja_renders(tmp_path, template):
    (tmp_path / "main.go").write_text(
        "package main\n"
        'import ("encoding/json"; "os"; "text/template")\n'
        "type Message struct { Role string; Content string }\n"
        "type Input struct { Messages []Message; Template string }\n"
        "func main() { var in Input; if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil { panic(err) }\n"
        't := template.Must(template.New("t").Parse(in.Template))\n'
        "if err := t.Execute(os.Stdout, in); err != nil { panic(err) } }\n"
    )
    go = {"HOME": str(tmp_path), "GOCACHE": str(tmp_path / "cache"), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    subprocess.run([GO, "build", "-o", "render", "main.go"], cwd=tmp_path, env=go, check=True)
    for roles in TALKS:
        chat = [{"role": role, "content": f"{role} {i}\nsecond line"} for i, role in enumerate(roles)]
        asked = {
            "Template": go_template(template),
            "Messages": [{k.title(): v for k, v in m.items()} for m in chat],
        }
        done = subprocess.run(
            [tmp_path / "render"], input=json.dumps(asked), capture_output=True, text=True, check=True
        )
        wanted = Renders(template).apply_chat_template(chat, False, add_generation_prompt=True)
        assert done.stdout == wanted.removeprefix("<bos>")


def test_known_families_are_written_in_go_s_form_and_others_refused():
    assert go_template(CHAT_TEMPLATE) == (
        "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
    )
    assert go_template(GEMMA).endswith("{{ end }}{{ end }}<start_of_turn>model\n")
    refuses = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no') }}{%- endif -%}" + GEMMA  # Gemma 2
    refusing = Renders(refuses)
    refusing.template.globals["raise_exception"] = refuse
    assert modelfile_text("x.gguf", refusing, stops=[]) == modelfile_text("x.gguf", Renders(GEMMA), stops=[])
    silent = "{%- if messages[0].role != 'system' -%}<|im_start|>system\nYou are kind<|im_end|>\n{%- endif -%}"
    for template in ("{{ messages[-1].content }}", silent + CHAT_TEMPLATE):
        with pytest.raises(ExportError, match="by hand"):
            modelfile_text("x.gguf", Renders(template), stops=[])


def refuse(message):
    raise jinja2.TemplateError(message)


# --- llama.cpp ----------------------------------------------------------------------------------------------
PROMPTS = [task.prompt for task in make_tasks(20, seed=5, split="test")]
needs_llama = pytest.mark.skipif(not has_llama(), reason="no llama.cpp here (pip install xllamacpp)")


@pytest.fixture(scope="module")
def answers(small_run):
    """Of the base in 32 bit with the adapter beside it, by transformers."""
    return [c.text for c in generate(load_model(small_run.adapter, four_bit=False), PROMPTS, max_new_tokens=72)]


@needs_llama
@pytest.mark.parametrize(("quantization", "equal"), [("f16", 20), ("q8_0", 18)])
def test_greedy_answers_are_those_of_transformers(small_merge, answers, tmp_path, quantization, equal):
    path = export_gguf(small_merge, tmp_path, quantization=quantization)
    found = check_export(path, small_merge)
    assert {c.reader for c in found} == {"transformers", "llama.cpp"}
    same = sum(a == b for a, b in zip(answers, llama_answers(path, PROMPTS, like=small_merge), strict=True))
    print(f"{quantization}: {same} of {len(PROMPTS)} answers the same; {found}")
    assert same >= equal


@needs_llama
def test_base_and_lora_file_together_are_the_adapter(small_run, answers, tmp_path):
    base = export_gguf("nano", tmp_path, quantization="f16")
    lora = export_lora_gguf(small_run, tmp_path)
    assert llama_answers(base, PROMPTS, like=NANO, lora=lora) == answers
    adapted = load_model(small_run.adapter, four_bit=False)
    (ids,) = chat_ids(adapted.tokenizer, PROMPTS[:1])
    with torch.inference_mode():
        ours = adapted.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    beside, alone = (Llama(base, length=256, lora=file).after(ids)[1] for file in (lora, None))
    assert (beside - ours).abs().max() < 0.05
    assert (alone - ours).abs().max() > 0.5


@needs_llama
def test_another_way_of_cutting_words_is_found(small_merge, tmp_path, monkeypatch):
    monkeypatch.setattr("ironlogic.export.gguf._word_rule", lambda _: "qwen2")  # single digits, unlike nano
    with pytest.raises(ExportError, match=r"llama\.cpp cuts .* into other tokens"):
        export_gguf(small_merge, tmp_path, quantization="f16")


def test_readers_of_a_file(tmp_path):
    path = tmp_path / "x.gguf"
    write_gguf(NANO, path, quantization="q8_0")
    assert gguf_readers(path)[0] == "q8_0"
    assert "transformers" in gguf_readers(path)[1]
    reader = gguf.GGUFReader(path, "r+")
    reader.fields["qwen3.attention.key_length"].parts[-1][0] = 64
    reader.data.flush()
    assert "transformers" not in gguf_readers(path)[1], "its reader would take 128 for granted"
    path.write_bytes(b"GGUF")
    with pytest.raises(ExportError, match="cut short or damaged"):
        gguf_readers(path)


def test_tools_of_a_checkout(tmp_path):
    tool = tmp_path / "build" / "bin" / "llama-quantize"
    tool.parent.mkdir(parents=True)
    tool.touch()
    assert find_quantizer(tmp_path) == tool
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys; open(sys.argv[3], 'w').write(' '.join(sys.argv[1:]))"
    )
    convert(tmp_path, NANO, tmp_path / "x.gguf", "f16")
    assert (tmp_path / "x.gguf").read_text() == f"{NANO} --outfile {tmp_path / 'x.gguf'} --outtype f16"
