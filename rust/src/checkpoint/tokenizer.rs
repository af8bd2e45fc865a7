//! Tokenizers: the files that one consists of, the tokens that it knows, and how it formats texts.

use std::collections::{BTreeMap, HashMap};

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::Result;
use crate::storage::store::Store;

/// The names of files that belong to tokenizers, as transformers and its predecessors write them.
const FILES: [&str; 18] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "sentencepiece.bpe.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "tokenizer.tiktoken",
];
/// The files that hold a chat template alone.
const TEMPLATES: [&str; 2] = ["chat_template.jinja", "chat_template.json"];
/// Settings that change how texts are encoded or where they end.
const SETTINGS: [&str; 4] = ["bos_token", "eos_token", "add_bos_token", "add_eos_token"];

/// Whether a file belongs to a tokenizer.
pub fn is_file_of_one(name: &str) -> bool {
    FILES.contains(&name) || name.ends_with(".tiktoken") || is_template(name)
}

/// Whether a file holds a chat template alone.
pub fn is_template(name: &str) -> bool {
    TEMPLATES.contains(&name)
}

/// `tokenizer.json`, but for its merges and everything else that need not be kept.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Whole {
    model: Model,
    added_tokens: Vec<Value>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Model {
    vocab: Value,
}

/// The tokens that a tokenizer knows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Vocabulary {
    /// The tokens with their ids, as far as they can be read.
    tokens: HashMap<String, u64>,
    /// The files of the others, which are only compared.
    unread: Vec<Vec<u8>>,
}

impl Vocabulary {
    /// One more than the largest id, if that is known.
    pub fn size(&self) -> Option<u64> {
        // What is added to tokens that cannot be read has the largest ids.
        self.tokens.values().max().map(|largest| largest + 1)
    }

    /// Whether every token of another has the same id here.
    pub fn includes(&self, other: &Self) -> bool {
        self.unread == other.unread
            && other.tokens.iter().all(|(token, id)| self.tokens.get(token) == Some(id))
    }
}

/// The tokenizer of a directory, as its files say.
#[derive(Debug)]
pub struct Tokenizer {
    files: BTreeMap<String, Vec<u8>>,
}

impl Tokenizer {
    /// The tokenizer that lies in a store; `None` where there is none. A chat template alone is one
    /// without tokens.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if a file cannot be read.
    pub fn read(store: &dyn Store) -> Result<Option<Self>> {
        let mut files = BTreeMap::new();
        for name in store.list()? {
            if is_file_of_one(&name) && store.is_file(&name) {
                let (content, _) = store.read_small(&name)?;
                files.insert(name, content);
            }
        }
        Ok((!files.is_empty()).then_some(Self { files }))
    }

    /// The names of its files.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    /// Whether it has tokens of its own, and not only a template or settings.
    pub fn has_tokens(&self) -> bool {
        self.names().any(holds_tokens)
    }

    /// Whether the files with the tokens are another's, byte for byte.
    pub fn has_same_files(&self, other: &Self) -> bool {
        let tokens = |tokenizer: &Self| -> Vec<(String, Vec<u8>)> {
            let files = tokenizer
                .files
                .iter()
                .filter(|(name, _)| holds_tokens(name) || name.as_str() == "tokenizer_config.json");
            files.map(|(name, content)| (name.clone(), content.clone())).collect()
        };
        tokens(self) == tokens(other)
    }

    /// The tokens that it knows.
    pub fn vocabulary(&self) -> Vocabulary {
        let mut vocabulary = Vocabulary::default();
        if let Some(whole) = self.files.get("tokenizer.json") {
            // What is broken holds nothing.
            let whole: Whole = serde_json::from_slice(whole).unwrap_or_default();
            vocabulary.add_main(&whole.model.vocab);
            for token in whole.added_tokens {
                vocabulary.add(token.get("content"), token.get("id").and_then(Value::as_u64));
            }
        } else if let Some(tokens) = self.object("vocab.json") {
            vocabulary.add_main(&Value::Object(tokens));
        } else if let Some(lines) = self.files.get("vocab.txt") {
            for (id, line) in String::from_utf8_lossy(lines).lines().enumerate() {
                vocabulary.tokens.insert(line.to_owned(), id as u64);
            }
        } else {
            let unread = self.files.iter().filter(|(name, _)| is_opaque(name));
            vocabulary.unread = unread.map(|(_, content)| content.clone()).collect();
        }
        for (token, id) in self.object("added_tokens.json").into_iter().flatten() {
            vocabulary.add(Some(&Value::String(token)), id.as_u64());
        }
        let decoder = self.setting("added_tokens_decoder");
        for (id, token) in decoder.as_ref().and_then(Value::as_object).into_iter().flatten() {
            vocabulary.add(token.get("content"), id.parse().ok());
        }
        vocabulary
    }

    /// How it formats a conversation: its templates by name.
    pub fn templates(&self) -> BTreeMap<String, String> {
        let trimmed = |text: &str| text.trim_end().to_owned();
        let of_settings = match self.setting("chat_template") {
            Some(Value::String(text)) => BTreeMap::from([("default".to_owned(), trimmed(&text))]),
            Some(Value::Array(several)) => (several.iter())
                .filter_map(|each| {
                    let name = each.get("name")?.as_str()?;
                    Some((name.to_owned(), trimmed(each.get("template")?.as_str()?)))
                })
                .collect(),
            _ => BTreeMap::new(),
        };
        let alone = self.files.get(TEMPLATES[0]).map(|text| String::from_utf8_lossy(text).into());
        let in_json = || {
            let template = self.object(TEMPLATES[1])?.remove("chat_template")?;
            template.as_str().map(str::to_owned)
        };
        match alone.or_else(in_json) {
            // The file is what is used, whatever the settings say.
            Some(text) => {
                let mut templates = of_settings;
                templates.insert("default".to_owned(), trimmed(&text));
                templates
            }
            None => of_settings,
        }
    }

    /// Those of its settings that change how texts are encoded or where they end.
    pub fn encoding_settings(&self) -> BTreeMap<&'static str, Value> {
        let map = self.object("special_tokens_map.json").unwrap_or_default();
        let of = |name: &'static str| {
            let value = self.setting(name).or_else(|| map.get(name).cloned())?;
            let content = value.get("content").cloned();
            let value = content.unwrap_or(value);
            (!value.is_null()).then_some((name, value))
        };
        SETTINGS.into_iter().filter_map(of).collect()
    }

    fn setting(&self, name: &str) -> Option<Value> {
        self.object("tokenizer_config.json")?.remove(name)
    }

    /// A file's JSON object; what is broken holds nothing.
    fn object(&self, name: &str) -> Option<Map<String, Value>> {
        serde_json::from_slice(self.files.get(name)?).ok()
    }
}

impl Vocabulary {
    /// The tokens of a model: a map to their ids, or a list of pairs in the ids' order.
    fn add_main(&mut self, tokens: &Value) {
        for (token, id) in tokens.as_object().into_iter().flatten() {
            if let Some(id) = id.as_u64() {
                self.tokens.insert(token.clone(), id);
            }
        }
        for (id, pair) in tokens.as_array().into_iter().flatten().enumerate() {
            if let Some(token) = pair.get(0).and_then(Value::as_str) {
                self.tokens.insert(token.to_owned(), id as u64);
            }
        }
    }

    fn add(&mut self, token: Option<&Value>, id: Option<u64>) {
        if let (Some(token), Some(id)) = (token.and_then(Value::as_str), id) {
            self.tokens.insert(token.to_owned(), id);
        }
    }
}

/// Whether tokens stand in a file of that name.
fn holds_tokens(name: &str) -> bool {
    matches!(name, "tokenizer.json" | "vocab.json" | "vocab.txt" | "added_tokens.json")
        || is_opaque(name)
}

/// Whether tokens stand in a file of that name in a form that is only compared.
fn is_opaque(name: &str) -> bool {
    name.ends_with(".model")
        || name.ends_with(".spm")
        || name.ends_with(".tiktoken")
        || matches!(name, "tekken.json" | "tokenizer.model.v3")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(files: &[(&str, &str)]) -> Tokenizer {
        let files = files.iter();
        Tokenizer {
            files: files
                .map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec()))
                .collect(),
        }
    }

    #[test]
    fn one_vocabulary_is_told_in_several_ways() {
        let fast = tokenizer(&[(
            "tokenizer.json",
            r#"{"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<x>"}]}"#,
        )]);
        let unigram = tokenizer(&[
            ("tokenizer.json", r#"{"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}"#),
            ("added_tokens.json", r#"{"<x>": 2}"#),
        ]);
        let slow = tokenizer(&[
            ("vocab.json", r#"{"a": 0, "b": 1}"#),
            ("tokenizer_config.json", r#"{"added_tokens_decoder": {"2": {"content": "<x>"}}}"#),
        ]);
        let lines = tokenizer(&[("vocab.txt", "a\nb\n<x>\n")]);
        for other in [&unigram, &slow, &lines] {
            assert_eq!(fast.vocabulary(), other.vocabulary());
        }
        assert_eq!(fast.vocabulary().size(), Some(3));
        let smaller = tokenizer(&[("vocab.txt", "a\nb\n")]).vocabulary();
        assert!(fast.vocabulary().includes(&smaller) && !smaller.includes(&fast.vocabulary()));
    }

    #[test]
    fn what_cannot_be_read_is_compared() {
        let one = tokenizer(&[("tokenizer.model", "\u{1}a")]);
        let other = tokenizer(&[("tokenizer.model", "\u{1}b")]);
        assert_ne!(one.vocabulary(), other.vocabulary());
        assert_eq!(one.vocabulary().size(), None);
        let more =
            tokenizer(&[("tokenizer.model", "\u{1}a"), ("added_tokens.json", r#"{"x": 9}"#)]);
        assert_eq!(more.vocabulary().size(), Some(10));
        assert!(more.vocabulary().includes(&one.vocabulary()));
        assert!(!more.vocabulary().includes(&other.vocabulary()));
    }

    #[test]
    fn a_template_stands_in_a_file_of_its_own_or_among_the_settings() {
        let alone = tokenizer(&[("chat_template.jinja", "{{ x }}\n")]);
        let among = tokenizer(&[("tokenizer_config.json", r#"{"chat_template": "{{ x }}"}"#)]);
        let several = r#"{"chat_template": [{"name": "default", "template": "{{ x }}"}]}"#;
        let several = tokenizer(&[("tokenizer_config.json", several)]);
        let json = tokenizer(&[("chat_template.json", r#"{"chat_template": "{{ x }}"}"#)]);
        for other in [&among, &several, &json] {
            assert_eq!(alone.templates(), other.templates());
        }
        assert!(!alone.has_tokens());
        let end = |text| tokenizer(&[("tokenizer_config.json", text)]).encoding_settings();
        assert_eq!(end(r#"{"eos_token": "e"}"#), end(r#"{"eos_token": {"content": "e"}}"#));
        assert_ne!(end(r#"{"eos_token": "e"}"#), end(r#"{"eos_token": "f"}"#));
    }
}
