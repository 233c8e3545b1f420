"""The demo's stand-in for XLM-R: translations lie together, unrelated words do not."""

import numpy as np

from modeling_uc2 import UC2ForPreTraining
from uc2.demo_text_encoder import latent_semantic_embeddings, save_demo_text_encoder
from uc2.rows import load_parallel_captions


def test_words_of_the_same_documents_lie_together():
    # Concept k is said by the words k and k + 10; word 20 is in every document, 21 in none.
    rng = np.random.default_rng(0)
    documents = []
    for _ in range(300):
        concepts = rng.choice(10, size=2, replace=False)
        documents.append(np.concatenate([concepts, concepts + 10, [20]]))
    embeddings = latent_semantic_embeddings(documents, 22, width=16)
    cosine = embeddings @ embeddings.T
    assert np.allclose(np.diag(cosine), 1, atol=1e-5)
    translations = cosine[np.arange(10), np.arange(10, 20)]
    others = cosine[:10, 10:20][~np.eye(10, dtype=bool)]
    assert translations.min() > 0.5 and translations.min() > others.max()
    assert np.abs(cosine[20:, :20]).max() < 0.7


def test_loads_as_a_text_encoder(tiny_corpus, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_corpus.tokenizer)
    captions = load_parallel_captions(tiny_corpus.captions)["captions"]
    save_demo_text_encoder(tmp_path, tokenizer, captions, hidden_size=16, num_heads=2)
    model = UC2ForPreTraining.from_text_encoder(tmp_path, region_feature_size=12)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path)) == len(tokenizer)
    embeddings = model.uc2.embeddings
    assert embeddings.position_embeddings.weight.std() < 0.5 * embeddings.word_embeddings.weight.std()
