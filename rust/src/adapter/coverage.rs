//! What becomes of each config field, each tensor and each file of an adapter: used, not needed, or refused.

use serde::Serialize;

/// What becomes of a part of an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Usage {
    /// It shapes the result.
    Used,
    /// The result is the same without it.
    NotNeeded,
    /// It cannot be merged.
    Refused,
}

/// One config field, tensor or file, and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PartUse {
    /// The field's, tensor's or file's name.
    pub name: String,
    /// What becomes of it.
    #[serde(rename = "use")]
    pub usage: Usage,
    /// Why, in half a sentence.
    pub reason: String,
}

impl PartUse {
    /// What becomes of a part of that name, and why.
    pub fn new(name: impl Into<String>, (usage, reason): (Usage, impl Into<String>)) -> Self {
        Self { name: name.into(), usage, reason: reason.into() }
    }
}

/// The same with what is refused let pass where its name is among `allow`.
pub(super) fn allowed(parts: &[PartUse], allow: &[String]) -> Vec<PartUse> {
    let passed = |part: &PartUse| match part.usage {
        Usage::Refused if allow.contains(&part.name) => {
            PartUse::new(part.name.as_str(), (Usage::NotNeeded, "allowed by name"))
        }
        _ => part.clone(),
    };
    parts.iter().map(passed).collect()
}

/// The reasons of all that is refused.
pub(super) fn refused(parts: &[PartUse]) -> Vec<String> {
    let refused = parts.iter().filter(|part| part.usage == Usage::Refused);
    refused.map(|part| part.reason.clone()).collect()
}

/// What becomes of a whole adapter, in the order of its files.
#[derive(Debug, Clone, Serialize)]
pub struct Coverage {
    /// Every field of the config.
    pub fields: Vec<PartUse>,
    /// Every tensor.
    pub tensors: Vec<PartUse>,
    /// Every file of weights in the adapter's directory.
    pub files: Vec<PartUse>,
}
