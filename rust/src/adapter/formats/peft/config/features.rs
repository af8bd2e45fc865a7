//! The settings that change what the factors in a file mean, beyond their ranks and scales.

use serde_json::{Map, Value};

use std::collections::{HashMap, HashSet};

use super::Reader;
use crate::adapter::semantics::{Initialization, TransposedExperts};
use crate::checkpoint::names::endings::Endings;
use crate::error::Result;
use crate::limits;

/// Which rows of which embeddings were trained (`trainable_token_indices`).
#[derive(Debug, Clone)]
pub enum Tokens {
    /// Rows of the input embedding.
    Input(Vec<u64>),
    /// Rows by the name of the module that has them.
    Named(Endings, Vec<Vec<u64>>),
}

impl Tokens {
    /// The rows of the module at `path`, whose end PEFT holds against the names.
    pub fn rows_of(&self, path: &str) -> Option<&[u64]> {
        match self {
            Self::Input(rows) => Some(rows),
            Self::Named(names, rows) => Some(&rows[names.first_end_of(path)?]),
        }
    }
}

/// Which factors are block-diagonal (`use_bdlora`), by parts of their modules' paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDiagonal {
    a: Vec<String>,
    b: Vec<String>,
    /// The number of blocks.
    pub blocks: u64,
}

impl BlockDiagonal {
    /// Whether the first factor of the module at `path` is.
    pub fn has_a(&self, path: &str) -> bool {
        self.a.iter().any(|part| path.contains(part.as_str()))
    }

    /// Whether the second factor is.
    pub fn has_b(&self, path: &str) -> bool {
        self.b.iter().any(|part| path.contains(part.as_str()))
    }
}

/// The version of PEFT that wrote a config.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Major, minor and patch.
    pub release: (u64, u64, u64),
    /// Whether it was built from a state between two releases.
    pub development: bool,
}

impl Version {
    /// How this version laid experts: as (in, out) before 0.19, in 0.19.0 but for those that the
    /// model takes as (in, out), and for those alone since. A state between two releases does not
    /// tell.
    pub fn transposed_experts(self) -> Option<TransposedExperts> {
        if self.development {
            return None;
        }
        Some(match self.release {
            (0, ..=18, _) => TransposedExperts::Always,
            (0, 19, 0) => TransposedExperts::UnlessStoredTransposed,
            _ => TransposedExperts::IfStoredTransposed,
        })
    }

    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(['.', '@', '+']);
        let mut next = || numbers.next().and_then(|number| number.parse().ok());
        let release = (next()?, next()?, next().unwrap_or(0));
        Some(Self { release, development: text.contains("dev") })
    }
}

/// Everything that this module reads.
#[derive(Debug, Clone)]
pub struct Features {
    /// The parameters that have factors of their own, by the ends of their names.
    pub target_parameters: TargetParameters,
    /// Trained rows of embeddings.
    pub tokens: Option<Tokens>,
    /// Block-diagonal factors.
    pub block_diagonal: Option<BlockDiagonal>,
    /// Whether each module has a diagonal and a base without its smallest singular components
    /// (KaSA; Wang et al. 2024, arXiv:2412.06071).
    pub kasa: bool,
    /// Which of the equal parts of a fused weight's outputs have factors (`enable_lora`).
    pub enabled_parts: Option<Vec<bool>>,
    /// The layers of the base that make up the model, as ranges without their ends.
    pub layer_replication: Option<Vec<(u64, u64)>>,
    /// How the factors began.
    pub initialization: Initialization,
    /// What `init_lora_weights` alone says of it.
    pub init_lora_weights: Initialization,
    /// Who wrote it; configs say so since 0.18.
    pub version: Option<Version>,
}

impl Features {
    pub(super) fn read(reader: &Reader<'_>) -> Result<Self> {
        let text = |field: &str| reader.raw.get(field).and_then(Value::as_str);
        let kasa = matches!(reader.raw.get("kasa_config"), Some(Value::Object(_)));
        Ok(Self {
            target_parameters: TargetParameters::of(
                reader.strings(reader.raw, "target_parameters")?,
            ),
            tokens: reader.tokens()?,
            block_diagonal: reader.block_diagonal()?,
            kasa,
            enabled_parts: reader.enabled_parts()?,
            layer_replication: reader.layer_replication()?,
            initialization: match initialization(reader.raw.get("init_lora_weights")) {
                _ if kasa => Initialization::Smallest,
                other => other,
            },
            init_lora_weights: initialization(reader.raw.get("init_lora_weights")),
            version: text("peft_version").and_then(Version::parse),
        })
    }
}

/// The parameters that have factors of their own (`target_parameters`).
#[derive(Debug, Clone, Default)]
pub struct TargetParameters {
    /// By the end of the module's path: the names of its parameters.
    of_modules: HashMap<String, Vec<String>>,
    /// The lengths of those ends.
    lengths: HashSet<usize>,
    /// Names that stand alone, which any module may have.
    bare: Vec<String>,
}

impl TargetParameters {
    fn of(targets: Vec<String>) -> Self {
        let mut parameters = Self::default();
        for target in targets {
            match target.rsplit_once('.') {
                Some((module, name)) => {
                    parameters.lengths.insert(module.len());
                    let names = parameters.of_modules.entry(module.to_owned()).or_default();
                    names.push(name.to_owned());
                }
                None => parameters.bare.push(target),
            }
        }
        parameters
    }

    /// The names of parameters that a module's factors may belong to: all whose leading part ends
    /// the module's path.
    ///
    /// # Errors
    /// In words, for more of them than a module has.
    pub fn of_module(&self, path: &str) -> Result<Vec<&str>, String> {
        let cuts = path.match_indices('.').map(|(dot, _)| &path[dot + 1..]);
        let ends = std::iter::once(path).chain(cuts);
        let ends = ends.filter(|end| self.lengths.contains(&end.len()));
        let own = ends.filter_map(|end| self.of_modules.get(end)).flatten();
        let mut names: Vec<_> = own.chain(&self.bare).map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > limits::PARAMETERS_OF_MODULE {
            return Err(format!(
                "names {} parameters of the module {path} in target_parameters; there can be {}",
                names.len(),
                limits::PARAMETERS_OF_MODULE
            ));
        }
        Ok(names)
    }
}

fn initialization(value: Option<&Value>) -> Initialization {
    let Some(Value::String(kind)) = value else {
        return match value {
            None | Some(Value::Null | Value::Bool(_)) => Initialization::Plain,
            Some(_) => Initialization::Unknown,
        };
    };
    match kind.to_lowercase().as_str() {
        "gaussian" | "eva" | "orthogonal" | "mica" => Initialization::Plain,
        "pissa" => Initialization::Largest { randomized: false },
        "olora" => Initialization::Leading,
        other if other.starts_with("pissa_niter_") => Initialization::Largest { randomized: true },
        _ => Initialization::Unknown,
    }
}

impl Reader<'_> {
    /// A list of names; none where the field is not set.
    fn strings(&self, fields: &Map<String, Value>, field: &str) -> Result<Vec<String>> {
        let names = match fields.get(field) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(names)) => names,
            Some(other) => {
                return Err(self.broken(format!("sets {field} to {other}; it is a list of names")));
            }
        };
        names
            .iter()
            .map(|name| match name.as_str() {
                Some(name) if !name.is_empty() => Ok(name.to_owned()),
                _ => Err(self.broken(format!("has {name} among the names of {field}"))),
            })
            .collect()
    }

    fn tokens(&self) -> Result<Option<Tokens>> {
        let field = "trainable_token_indices";
        Ok(match self.raw.get(field) {
            None | Some(Value::Null) => None,
            Some(Value::Array(items)) if items.is_empty() => None,
            Some(Value::Object(items)) if items.is_empty() => None,
            Some(Value::Object(entries)) => {
                let names = Endings::of(entries.keys().map(String::as_str));
                let rows = entries.values().map(|rows| self.rows(field, rows));
                Some(Tokens::Named(names, rows.collect::<Result<_>>()?))
            }
            Some(rows) => Some(Tokens::Input(self.rows(field, rows)?)),
        })
    }

    fn rows(&self, field: &str, value: &Value) -> Result<Vec<u64>> {
        let broken = || {
            self.broken(format!("sets {field} to {value}; tokens are whole numbers of at least 0"))
        };
        let rows: Vec<_> = value
            .as_array()
            .and_then(|rows| rows.iter().map(Value::as_u64).collect())
            .ok_or_else(broken)?;
        if let Some(row) = rows.iter().find(|row| **row > limits::TOKEN) {
            return Err(self.broken(format!(
                "names the token {row} in {field}; a token is at most {}",
                limits::TOKEN
            )));
        }
        let mut sorted = rows.clone();
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(self.broken(format!("names the token {} twice in {field}", pair[0]))),
            None => Ok(rows),
        }
    }

    fn block_diagonal(&self) -> Result<Option<BlockDiagonal>> {
        let fields = match self.raw.get("use_bdlora") {
            None | Some(Value::Null | Value::Bool(false)) => return Ok(None),
            Some(Value::Object(fields)) => fields,
            Some(other) => {
                return Err(self.broken(format!("sets use_bdlora to {other}; it is an object")));
            }
        };
        let blocks = match fields.get("nblocks") {
            None => 1,
            Some(value) => value.as_u64().filter(|blocks| *blocks > 0).ok_or_else(|| {
                self.broken(format!("sets nblocks of use_bdlora to {value}; it is at least 1"))
            })?,
        };
        if blocks > limits::BLOCKS {
            return Err(self.broken(format!(
                "sets nblocks of use_bdlora to {blocks}; there can be {}",
                limits::BLOCKS
            )));
        }
        let substrings = |field: &str| {
            let names = self.strings(fields, field)?;
            self.bounded(field, "names", names.len(), limits::SUBSTRINGS)?;
            Ok(names)
        };
        let (a, b) = (substrings("target_modules_bd_a")?, substrings("target_modules_bd_b")?);
        Ok(Some(BlockDiagonal { a, b, blocks }))
    }

    fn layer_replication(&self) -> Result<Option<Vec<(u64, u64)>>> {
        let value = match self.raw.get("layer_replication") {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Array(ranges)) if ranges.is_empty() => return Ok(None),
            Some(value) => value,
        };
        let range = |value: &Value| match value.as_array()?.as_slice() {
            [start, end] => {
                let (start, end) = (start.as_u64()?, end.as_u64()?);
                (start < end).then_some((start, end))
            }
            _ => None,
        };
        let ranges: Option<Vec<(u64, u64)>> =
            value.as_array().and_then(|ranges| ranges.iter().map(range).collect());
        let ranges = ranges.ok_or_else(|| {
            self.broken(format!(
                "sets layer_replication to {value}; it is a list of pairs [first layer, end]"
            ))
        })?;
        // Before they are written out: a range can be of any length.
        let layers = ranges.iter().fold(0u64, |sum, (start, end)| sum.saturating_add(end - start));
        if layers > limits::LAYERS {
            return Err(self.broken(format!(
                "makes {layers} layers by layer_replication; there can be {}",
                limits::LAYERS
            )));
        }
        Ok(Some(ranges))
    }

    fn enabled_parts(&self) -> Result<Option<Vec<bool>>> {
        let value = match self.raw.get("enable_lora") {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let flags: Option<Vec<_>> =
            value.as_array().and_then(|flags| flags.iter().map(Value::as_bool).collect());
        match flags {
            Some(flags) if flags.is_empty() => Ok(None),
            Some(flags) if flags.contains(&true) => {
                self.bounded("enable_lora", "parts", flags.len(), limits::PARTS)?;
                Ok(Some(flags))
            }
            _ => Err(self.broken(format!(
                "sets enable_lora to {value}; it is a list of true and false, not all false"
            ))),
        }
    }
}
