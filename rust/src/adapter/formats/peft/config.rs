//! `adapter_config.json` as PEFT writes it: what it says of ranks and scales, and what in it
//! changes the merged result.

mod features;
mod fields;
mod patterns;
mod rotation;

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::adapter::Module;
use crate::adapter::format::GivenScale;
use crate::adapter::semantics::Semantics;
use crate::checkpoint::heads::Task;
use crate::checkpoint::names::endings::Endings;
use crate::error::{Error, Result, with_article};
use crate::limits;

use features::{Features, Version};
use patterns::{Budget, Fault, MAXIMUM_PATTERNS, Patterns};
pub use rotation::Rotation;

/// The config's file name.
pub const FILE_NAME: &str = "adapter_config.json";

/// `rank_pattern` or `alpha_pattern`: the patterns and the value of each.
#[derive(Debug, Clone)]
struct Table<T> {
    field: &'static str,
    patterns: Patterns,
    keys: Vec<String>,
    values: Vec<T>,
}

/// A read and checked config.
#[derive(Debug, Clone)]
pub struct PeftConfig {
    path: PathBuf,
    raw: Map<String, Value>,
    rank: u64,
    alpha: f64,
    rank_patterns: Table<u64>,
    alpha_patterns: Table<f64>,
    rank_stabilized: bool,
    fan_in_fan_out: bool,
    dora: bool,
    lora_bias: bool,
    features: Features,
    saved_modules: Endings,
    /// What tells scales, where there is no config.
    missing: Option<GivenScale>,
    method: Method,
    feedforward: Feedforward,
    rotation: Option<Rotation>,
}

/// What kind of adapter a config describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// A low-rank product.
    Lora,
    /// An elementwise product of two of them.
    Loha,
    /// A Kronecker product.
    Lokr,
    /// A factor on each input or output.
    Ia3,
    /// Orthogonal blocks on the inputs.
    Oft,
}

impl Method {
    /// As PEFT calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lora => "LORA",
            Self::Loha => "LOHA",
            Self::Lokr => "LOKR",
            Self::Ia3 => "IA3",
            Self::Oft => "OFT",
        }
    }

    /// The field of its alpha.
    fn alpha(self) -> &'static str {
        if self == Self::Lora { "lora_alpha" } else { "alpha" }
    }
}

/// The modules of an IA3 adapter of which the inputs are scaled.
#[derive(Debug, Clone)]
enum Feedforward {
    /// Those whose paths end so.
    Ends(Vec<String>),
    /// Those that an expression matches.
    Pattern(Box<Table<()>>),
}

impl PeftConfig {
    /// Checks what an `adapter_config.json` of that path holds.
    ///
    /// # Errors
    /// [`Error::Adapter`] if it is broken, and [`Error::Unsupported`] if it describes something
    /// other than a LoRA.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let raw: Map<String, Value> = serde_json::from_slice(text).map_err(|error| {
            // Python writes non-finite numbers as bare words that JSON does not have.
            let text = String::from_utf8_lossy(text);
            let non_finite = [": NaN", ": Infinity", ": -Infinity"];
            let message = match non_finite.iter().find(|word| text.contains(**word)) {
                Some(word) => format!("holds the number {}, which no setting can be", &word[2..]),
                None => format!("is not a JSON object: {error}"),
            };
            Error::adapter(path, message)
        })?;
        Self::from_fields(path, raw)
    }

    fn from_fields(path: &Path, raw: Map<String, Value>) -> Result<Self> {
        let reader = Reader { path, raw: &raw };
        let method = match raw.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => Method::Lora,
            Some("LOHA") => Method::Loha,
            Some("LOKR") => Method::Lokr,
            Some("IA3") => Method::Ia3,
            Some("OFT") => Method::Oft,
            Some(other) => {
                return Err(Error::unsupported(
                    path,
                    format!(
                        "is {} adapter (peft_type); only LoRA, LoHa, LoKr, IA3 and OFT adapters can \
                         be merged",
                        with_article(other)
                    ),
                ));
            }
            None if raw.contains_key("fine_tune_type") => {
                return Err(Error::unsupported(
                    path,
                    "is a config of MLX's, but the weights beside it have the name of PEFT's; put the \
                     config there that was saved with them",
                ));
            }
            None => return Err(reader.broken("has no peft_type; it is no PEFT adapter config")),
        };
        let (rank, alpha) = match method {
            // They have neither; r is a number of blocks, which the tensors tell.
            Method::Ia3 | Method::Oft => (1, 1.0),
            Method::Lora | Method::Loha | Method::Lokr => {
                let alpha = method.alpha();
                (
                    reader.rank("r", raw.get("r").unwrap_or(&Value::Null))?,
                    reader.alpha(alpha, raw.get(alpha).unwrap_or(&Value::Null))?,
                )
            }
        };
        let rotation = (method == Method::Oft).then(|| Rotation::read(&reader)).transpose()?;
        let budget = Budget::default();
        let rank_patterns = reader.patterns("rank_pattern", Reader::rank, &budget)?;
        let alpha_patterns = reader.patterns("alpha_pattern", Reader::alpha, &budget)?;
        let rank_stabilized = reader.flag("use_rslora")?;
        let fan_in_fan_out = reader.flag("fan_in_fan_out")?;
        let dora = reader.flag("use_dora")?;
        let lora_bias = reader.flag("lora_bias")?;
        let features = Features::read(&reader)?;
        let saved_modules = match raw.get("modules_to_save") {
            Some(Value::Array(names)) => Endings::of(names.iter().filter_map(Value::as_str)),
            _ => Endings::default(),
        };
        let feedforward = match raw.get("feedforward_modules") {
            Some(Value::Array(names)) => Feedforward::Ends(
                names.iter().filter_map(Value::as_str).map(str::to_owned).collect(),
            ),
            Some(Value::String(pattern)) if method == Method::Ia3 => {
                let keys = vec![pattern.clone()];
                let patterns = Patterns::new(keys.clone(), budget)
                    .map_err(|fault| refuse_pattern(path, "feedforward_modules", &keys, fault))?;
                let field = "feedforward_modules";
                let table = Table { field, patterns, keys, values: vec![()] };
                Feedforward::Pattern(Box::new(table))
            }
            _ => Feedforward::Ends(Vec::new()),
        };
        Ok(Self {
            path: path.to_path_buf(),
            rank,
            alpha,
            rank_patterns,
            alpha_patterns,
            rank_stabilized,
            fan_in_fan_out,
            dora,
            lora_bias,
            features,
            saved_modules,
            missing: None,
            method,
            feedforward,
            rotation,
            raw,
        })
    }

    /// What stands for a config that is not there: ranks are those of the factors.
    pub fn missing(path: &Path, scale: GivenScale) -> Self {
        let raw = Map::from_iter([
            ("peft_type".to_owned(), Value::from("LORA")),
            ("r".to_owned(), Value::from(1)),
            ("lora_alpha".to_owned(), Value::from(1)),
        ]);
        let config = Self::from_fields(path, raw).expect("a plain config");
        let alpha = match scale {
            GivenScale::Alpha(alpha) => alpha,
            _ => f64::NAN,
        };
        Self { raw: Map::new(), alpha, missing: Some(scale), ..config }
    }

    /// What kind of adapter it describes.
    pub fn method(&self) -> Method {
        self.method
    }

    /// How the rotations of an OFT adapter are made.
    pub fn rotation(&self) -> Option<Rotation> {
        self.rotation
    }

    /// Whether IA3 scales the inputs of a module and not its outputs.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the config's patterns take more steps than they may.
    pub fn is_feedforward(&self, path: &str, written: &str) -> Result<bool> {
        match &self.feedforward {
            Feedforward::Ends(ends) => {
                Ok(ends.iter().any(|end| path.ends_with(end) || written.ends_with(end)))
            }
            Feedforward::Pattern(table) => Ok(table.value_of(&self.path, path, written)?.is_some()),
        }
    }

    /// Whether it only stands for one that is not there.
    pub fn is_missing(&self) -> bool {
        self.missing.is_some()
    }

    /// Where the config lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `r`, the rank of modules that no pattern names.
    pub fn rank(&self) -> u64 {
        self.rank
    }

    /// `lora_alpha`, the alpha of modules that no pattern names.
    pub fn alpha(&self) -> f64 {
        self.alpha
    }

    /// Whether the scale is α/√r (`use_rslora`) instead of α/r.
    pub fn is_rank_stabilized(&self) -> bool {
        self.rank_stabilized
    }

    /// Whether every module has a magnitude (`use_dora`; Liu et al. 2024, arXiv:2402.09353).
    pub fn uses_dora(&self) -> bool {
        self.dora
    }

    /// Whether every `lora_B` has a bias (`lora_bias`).
    pub fn has_lora_bias(&self) -> bool {
        self.lora_bias
    }

    /// What changes the meaning of the factors beyond ranks and scales.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// The flag as it stands in the file. PEFT corrects it from the layer's type when it loads the
    /// adapter and does not always write the correction back, so it is a hint and no more.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The rank of the module at `path` (without `base_model.model.`): the first pattern in the
    /// order of the file that matches, or `r`. Patterns that know the path by what training tools
    /// put into it match it as it is `written`.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the config's patterns take more steps than they may.
    pub fn rank_of(&self, path: &str, written: &str) -> Result<u64> {
        let found = self.rank_patterns.value_of(&self.path, path, written)?;
        Ok(found.copied().unwrap_or(self.rank))
    }

    /// The alpha of the module at `path`, found like its rank but on its own.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the config's patterns take more steps than they may.
    pub fn alpha_of(&self, path: &str, written: &str) -> Result<f64> {
        let found = self.alpha_patterns.value_of(&self.path, path, written)?;
        Ok(found.copied().unwrap_or(self.alpha))
    }

    /// The factor s of ΔW = s·B·A for a module of that alpha and rank: α/r, or α/√r for rsLoRA
    /// (Kalajdzievski 2023, arXiv:2312.03732).
    pub fn scaling(&self, alpha: f64, rank: u64) -> f64 {
        if let Some(GivenScale::Factor(scale)) = self.missing {
            return scale;
        }
        let rank = rank as f64;
        alpha / if self.rank_stabilized { rank.sqrt() } else { rank }
    }

    /// What the factors mean.
    pub fn semantics(&self) -> Semantics {
        let base = self.raw.get("base_model_name_or_path").and_then(Value::as_str).map(str::trim);
        Semantics {
            scale_is_given: self.is_missing(),
            initialization: self.features.initialization,
            layer_replication: self.features.layer_replication.clone(),
            ties_weights: self.raw.get("ensure_weight_tying").and_then(Value::as_bool)
                == Some(true),
            stored_transposed: self.fan_in_fan_out,
            transposed_experts: self.features.version.and_then(Version::transposed_experts),
            names_scale: false,
            rank_stabilized: self.rank_stabilized,
            task: self.raw.get("task_type").and_then(Value::as_str).and_then(task_of),
            base: base.filter(|base| !base.is_empty()).map(str::to_owned),
            unknown_order: None,
        }
    }

    /// Every field as it stood in the file.
    pub fn into_raw(self) -> Map<String, Value> {
        self.raw
    }

    /// Whether a parameter belongs to a module that `modules_to_save` names. PEFT matches the names
    /// against the ends of the modules' paths.
    pub fn saves_module_of(&self, parameter: &str) -> bool {
        let mut modules = parameter.match_indices('.').map(|(end, _)| &parameter[..end]);
        modules.any(|module| self.saved_modules.first_end_of(module).is_some())
    }
}

impl<T> Table<T> {
    /// The value of the first pattern that matches a path, or else the path as it is written.
    fn value_of(&self, config: &Path, path: &str, written: &str) -> Result<Option<&T>> {
        match self.first_match(config, path)? {
            None if written != path => self.first_match(config, written),
            found => Ok(found),
        }
    }

    fn first_match(&self, config: &Path, path: &str) -> Result<Option<&T>> {
        let found = self.patterns.first_match(path);
        let found = found.map_err(|fault| refuse_pattern(config, self.field, &self.keys, fault))?;
        Ok(found.map(|position| &self.values[position]))
    }
}

/// What is wrong with one of a field's patterns.
fn refuse_pattern(config: &Path, field: &str, keys: &[String], fault: Fault) -> Error {
    let message = match fault {
        Fault::Invalid(position, error) => {
            format!("has an invalid expression in {field}, {:?}: {error}", keys[position])
        }
        Fault::Exceeded(position) => format!(
            "has patterns that take more than {} steps to match, at last {:?} of {field}; write the \
             modules' names in its place",
            patterns::STEPS,
            keys[position]
        ),
    };
    Error::adapter(config, message)
}

struct Reader<'a> {
    path: &'a Path,
    raw: &'a Map<String, Value>,
}

impl Reader<'_> {
    fn broken(&self, message: impl Into<String>) -> Error {
        Error::adapter(self.path, message)
    }

    fn rank(&self, field: &str, value: &Value) -> Result<u64> {
        match value.as_u64() {
            Some(rank @ 1..=limits::RANK) => Ok(rank),
            Some(rank) if rank > limits::RANK => {
                Err(self
                    .broken(format!("sets {field} to {rank}; a rank is at most {}", limits::RANK)))
            }
            _ if value.is_null() => Err(self.broken(format!("has no {field}"))),
            _ => Err(self.broken(format!(
                "sets {field} to {value}; a rank is a whole number of at least 1"
            ))),
        }
    }

    fn alpha(&self, field: &str, value: &Value) -> Result<f64> {
        match value.as_f64() {
            Some(alpha) if alpha.is_finite() => Ok(alpha),
            _ if value.is_null() => Err(self.broken(format!("has no {field}"))),
            _ => Err(self.broken(format!("sets {field} to {value}; an alpha is a finite number"))),
        }
    }

    fn flag(&self, field: &str) -> Result<bool> {
        match self.raw.get(field) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => {
                Err(self.broken(format!("sets {field} to {other}; it is true or false")))
            }
        }
    }

    fn patterns<T>(
        &self,
        field: &'static str,
        read: impl Fn(&Self, &str, &Value) -> Result<T>,
        budget: &Budget,
    ) -> Result<Table<T>> {
        let none = Map::new();
        let entries = match self.raw.get(field) {
            None | Some(Value::Null) => &none,
            Some(Value::Object(entries)) => entries,
            Some(other) => {
                return Err(
                    self.broken(format!("sets {field} to {other}; it maps names to numbers"))
                );
            }
        };
        self.bounded(field, "patterns", entries.len(), MAXIMUM_PATTERNS)?;
        let keys: Vec<String> = entries.keys().cloned().collect();
        let patterns = Patterns::new(keys.clone(), budget.clone())
            .map_err(|fault| refuse_pattern(self.path, field, &keys, fault))?;
        let values = entries
            .iter()
            .map(|(key, value)| read(self, &format!("{field}[{key:?}]"), value))
            .collect::<Result<_>>()?;
        Ok(Table { field, patterns, keys, values })
    }

    /// # Errors
    /// [`Error::Adapter`] for a field with more entries than there can be.
    fn bounded(&self, field: &str, what: &str, count: usize, most: usize) -> Result<()> {
        if count <= most {
            return Ok(());
        }
        Err(self.broken(format!("has {count} {what} in {field}; there can be {most}")))
    }
}

/// What PEFT calls a task.
fn task_of(name: &str) -> Option<Task> {
    match name {
        "SEQ_CLS" => Some(Task::SequenceClassification),
        "TOKEN_CLS" => Some(Task::TokenClassification),
        "QUESTION_ANS" => Some(Task::QuestionAnswering),
        "CAUSAL_LM" | "SEQ_2_SEQ_LM" => Some(Task::Language),
        _ => None,
    }
}

/// The fields that describe an adapter to a person, for listings.
pub fn summary(
    config: &PeftConfig,
    modules: &IndexMap<String, Module>,
) -> IndexMap<&'static str, Value> {
    let field = |name: &str| config.raw.get(name).cloned().unwrap_or(Value::Null);
    let mut summary = IndexMap::from([
        ("type", field("peft_type")),
        ("base", field("base_model_name_or_path")),
        ("r", field("r")),
        ("alpha", field(config.method.alpha())),
        ("rslora", Value::Bool(config.rank_stabilized)),
        ("peft_version", field("peft_version")),
    ]);
    if config.is_missing() {
        summary.insert("type", "LORA".into());
        let first = modules.values().next().map(|module| module.rank);
        let common = first.filter(|rank| modules.values().all(|module| module.rank == *rank));
        summary.insert("r", common.map_or(Value::Null, Value::from));
        let alpha = Some(config.alpha).filter(|alpha| alpha.is_finite());
        summary.insert("alpha", alpha.map_or(Value::Null, Value::from));
    }
    summary
}

#[cfg(test)]
mod tests;
