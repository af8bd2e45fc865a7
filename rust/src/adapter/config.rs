//! `adapter_config.json` as PEFT writes it: what it says of ranks and scales, and what in it
//! changes the merged result.

use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The config's file name.
pub const FILE_NAME: &str = "adapter_config.json";

/// A pattern of `rank_pattern` or `alpha_pattern` with its value.
#[derive(Debug, Clone)]
struct Pattern<T> {
    regex: Regex,
    value: T,
}

/// A read and checked config.
#[derive(Debug, Clone)]
pub struct PeftConfig {
    path: PathBuf,
    raw: Map<String, Value>,
    rank: u64,
    alpha: f64,
    rank_patterns: Vec<Pattern<u64>>,
    alpha_patterns: Vec<Pattern<f64>>,
    rank_stabilised: bool,
    fan_in_fan_out: bool,
    dora: bool,
    lora_bias: bool,
}

/// What a config field means for the merge.
enum Meaning {
    /// It only mattered while training, or the adapter's tensors say the same.
    Harmless,
    /// Read by this module or the planner.
    Used,
    /// It asks for something under this name unless it is unset.
    Feature(&'static str),
}

/// Every field that a PEFT LoRA config of the releases up to 0.21 can hold.
fn meaning(field: &str) -> Option<Meaning> {
    Some(match field {
        "task_type" | "peft_type" | "auto_mapping" | "peft_version" | "revision"
        | "base_model_name_or_path" | "inference_mode" | "target_modules" | "exclude_modules"
        | "layers_to_transform" | "layers_pattern" | "lora_dropout" | "megatron_core"
        | "qalora_group_size" | "runtime_config" | "merge_weights"
        // These say how the factors were initialised; `init_lora_weights` says whether that
        // changed the base.
        | "loftq_config" | "eva_config" | "corda_config" | "lora_ga_config"
        // Extra training-time tensors; PEFT's merge ignores them.
        | "velora_config" | "monteclora_config"
        // The tensors in the file say which modules were saved, and each is accounted for.
        | "modules_to_save" | "bias" | "lora_bias" => Meaning::Harmless,
        "r" | "lora_alpha" | "rank_pattern" | "alpha_pattern" | "use_rslora" | "fan_in_fan_out"
        | "init_lora_weights" | "use_dora" | "alpha" => Meaning::Used,
        "trainable_token_indices" => Meaning::Feature("trained token embeddings"),
        "target_parameters" => Meaning::Feature("LoRA on parameters (target_parameters)"),
        "layer_replication" => Meaning::Feature("layer replication"),
        "megatron_config" => Meaning::Feature("Megatron's parallel layers"),
        "alora_invocation_tokens" => Meaning::Feature("activated LoRA (aLoRA), which cannot be merged"),
        "use_qalora" => Meaning::Feature("QALoRA, which cannot be merged"),
        "arrow_config" => Meaning::Feature("Arrow routing, which cannot be merged"),
        "use_bdlora" => Meaning::Feature("block-diagonal LoRA (BD-LoRA)"),
        "kasa_config" => Meaning::Feature("KaSA"),
        "ensure_weight_tying" => Meaning::Feature("ensured weight tying"),
        "enable_lora" => Meaning::Feature("the MergedLinear layout of PEFT's first releases"),
        _ => return None,
    })
}

/// Whether a value leaves a field unset.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    }
}

impl PeftConfig {
    /// Reads and checks `adapter_config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read, [`Error::Adapter`] if it is broken, and
    /// [`Error::Unsupported`] if it describes something other than a LoRA.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(|error| Error::io(path, error))?;
        let raw: Map<String, Value> = serde_json::from_slice(&text).map_err(|error| {
            // Python writes non-finite numbers as bare words that JSON does not have.
            let text = String::from_utf8_lossy(&text);
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
        match raw.get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            Some(other) => {
                return Err(Error::unsupported(
                    path,
                    format!("is a {other} adapter (peft_type); only LoRA adapters can be merged"),
                ));
            }
            None if raw.contains_key("fine_tune_type") => {
                return Err(Error::unsupported(
                    path,
                    "is an MLX adapter, whose format cannot be read yet; convert it to PEFT's",
                ));
            }
            None => return Err(reader.broken("has no peft_type; it is no PEFT adapter config")),
        }
        let rank = reader.rank("r", raw.get("r").unwrap_or(&Value::Null))?;
        let alpha = reader.alpha("lora_alpha", raw.get("lora_alpha").unwrap_or(&Value::Null))?;
        let rank_patterns = reader.patterns("rank_pattern", Reader::rank)?;
        let alpha_patterns = reader.patterns("alpha_pattern", Reader::alpha)?;
        let rank_stabilised = reader.flag("use_rslora")?;
        let fan_in_fan_out = reader.flag("fan_in_fan_out")?;
        let dora = reader.flag("use_dora")?;
        let lora_bias = reader.flag("lora_bias")?;
        Ok(Self {
            path: path.to_path_buf(),
            rank,
            alpha,
            rank_patterns,
            alpha_patterns,
            rank_stabilised,
            fan_in_fan_out,
            dora,
            lora_bias,
            raw,
        })
    }

    /// Where the config lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every field as it stands in the file.
    pub fn raw(&self) -> &Map<String, Value> {
        &self.raw
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
    pub fn is_rank_stabilised(&self) -> bool {
        self.rank_stabilised
    }

    /// Whether every module has a magnitude (`use_dora`; Liu et al. 2024, arXiv:2402.09353).
    pub fn uses_dora(&self) -> bool {
        self.dora
    }

    /// Whether every `lora_B` has a bias (`lora_bias`).
    pub fn has_lora_bias(&self) -> bool {
        self.lora_bias
    }

    /// The flag as it stands in the file. PEFT corrects it from the layer's type when it loads the
    /// adapter and does not always write the correction back, so it is a hint and no more.
    pub fn fan_in_fan_out(&self) -> bool {
        self.fan_in_fan_out
    }

    /// The rank of the module at `path` (without `base_model.model.`): the first pattern in the
    /// order of the file that matches, or `r`.
    pub fn rank_of(&self, path: &str) -> u64 {
        first_match(&self.rank_patterns, path).copied().unwrap_or(self.rank)
    }

    /// The alpha of the module at `path`, found like its rank but on its own.
    pub fn alpha_of(&self, path: &str) -> f64 {
        first_match(&self.alpha_patterns, path).copied().unwrap_or(self.alpha)
    }

    /// The factor s of ΔW = s·B·A for a module of that alpha and rank: α/r, or α/√r for rsLoRA
    /// (Kalajdzievski 2023, arXiv:2312.03732).
    pub fn scaling(&self, alpha: f64, rank: u64) -> f64 {
        let rank = rank as f64;
        alpha / if self.rank_stabilised { rank.sqrt() } else { rank }
    }

    /// Whether a parameter belongs to a module that `modules_to_save` names. PEFT matches the names
    /// against the ends of the modules' paths.
    pub fn saves_module_of(&self, parameter: &str) -> bool {
        let Some(Value::Array(names)) = self.raw.get("modules_to_save") else { return false };
        parameter.match_indices('.').any(|(end, _)| {
            let module = &parameter[..end];
            names.iter().filter_map(Value::as_str).any(|name| module.ends_with(name))
        })
    }

    /// What the config asks for that a merge of plain low-rank products would get wrong, each as
    /// half a sentence that names the field. Fields named in `allow` are let pass.
    pub fn obstacles(&self, allow: &[String]) -> Vec<String> {
        let mut obstacles = Vec::new();
        for (field, value) in &self.raw {
            if is_unset(value) || allow.iter().any(|allowed| allowed == field) {
                continue;
            }
            match meaning(field) {
                Some(Meaning::Harmless) => {}
                Some(Meaning::Used) => obstacles.extend(self.obstacle_in_used(field, value)),
                Some(Meaning::Feature(name)) => {
                    obstacles.push(format!("uses {name} ({field}), which cannot be merged yet"));
                }
                None => obstacles.push(format!(
                    "has the unknown config field {field} = {value}, which could change the result; \
                     allow it by name if it does not"
                )),
            }
        }
        obstacles
    }

    fn obstacle_in_used(&self, field: &str, value: &Value) -> Option<String> {
        match (field, value) {
            // A stray copy of lora_alpha that some tools write.
            ("alpha", _) if value.as_f64() == Some(self.alpha) => None,
            ("alpha", _) => Some(format!(
                "has the field alpha = {value} beside lora_alpha = {}; remove the wrong one",
                self.alpha
            )),
            ("init_lora_weights", Value::Bool(_)) => None,
            ("init_lora_weights", Value::String(kind))
                if ["gaussian", "eva", "orthogonal", "mica"].contains(&kind.as_str()) =>
            {
                None
            }
            ("init_lora_weights", _) => Some(format!(
                "was initialised with {value} (init_lora_weights), which changes the base weights; \
                 it cannot be merged yet"
            )),
            _ => None,
        }
    }
}

fn first_match<'a, T>(patterns: &'a [Pattern<T>], path: &str) -> Option<&'a T> {
    patterns
        .iter()
        // A pattern that backtracks without end on this path matches nothing, as far as anyone
        // can know; the rank's check against the tensors catches what follows from that.
        .find(|pattern| pattern.regex.is_match(path).unwrap_or(false))
        .map(|pattern| &pattern.value)
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
            Some(rank) if rank > 0 => Ok(rank),
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
        field: &str,
        read: impl Fn(&Self, &str, &Value) -> Result<T>,
    ) -> Result<Vec<Pattern<T>>> {
        let entries = match self.raw.get(field) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Object(entries)) => entries,
            Some(other) => {
                return Err(
                    self.broken(format!("sets {field} to {other}; it maps names to numbers"))
                );
            }
        };
        entries
            .iter()
            .map(|(key, value)| {
                // PEFT's own expression, groups included, so that a back-reference in a key
                // counts the same.
                let regex = Regex::new(&format!(r"^(.*\.)?({key})$")).map_err(|error| {
                    self.broken(format!("has an invalid expression in {field}, {key:?}: {error}"))
                })?;
                let value = read(self, &format!("{field}[{key:?}]"), value)?;
                Ok(Pattern { regex, value })
            })
            .collect()
    }
}

/// The fields that describe an adapter to a person, for listings.
pub fn summary(config: &PeftConfig) -> IndexMap<&'static str, Value> {
    let field = |name: &str| config.raw.get(name).cloned().unwrap_or(Value::Null);
    IndexMap::from([
        ("type", field("peft_type")),
        ("base", field("base_model_name_or_path")),
        ("r", field("r")),
        ("alpha", field("lora_alpha")),
        ("rslora", Value::Bool(config.rank_stabilised)),
        ("peft_version", field("peft_version")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Result<PeftConfig> {
        let raw = serde_json::from_str(text).expect("JSON");
        PeftConfig::from_fields(Path::new("adapter_config.json"), raw)
    }

    fn complaint(text: &str) -> String {
        config(text).expect_err("a broken config").to_string()
    }

    #[test]
    fn patterns_match_as_in_peft() {
        let config = config(
            r#"{"peft_type": "LORA", "r": 8, "lora_alpha": 16,
                "rank_pattern": {"q_proj": 4, "model.layers.0.self_attn.k_proj": 2,
                                 ".*\\.(?!1\\.)\\d+\\.mlp\\.up": 32},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 1.5, "q_proj": 3}}"#,
        )
        .expect("sound");
        assert_eq!(config.rank_of("model.layers.7.self_attn.q_proj"), 4);
        assert_eq!(config.rank_of("q_proj"), 4);
        assert_eq!(config.rank_of("model.layers.7.self_attn.qq_proj"), 8);
        assert_eq!(config.rank_of("model.layers.0.self_attn.k_proj"), 2);
        assert_eq!(config.rank_of("model.layers.0.mlp.up"), 32);
        assert_eq!(config.rank_of("model.layers.1.mlp.up"), 8);
        assert_eq!(config.alpha_of("model.layers.1.self_attn.q_proj"), 1.5);
        assert_eq!(config.alpha_of("model.layers.11.self_attn.q_proj"), 3.0);
        assert_eq!(config.alpha_of("model.layers.1.self_attn.v_proj"), 16.0);
    }

    #[test]
    fn the_scale_is_alpha_over_rank_or_its_root() {
        let plain = config(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 8}"#).expect("sound");
        assert_eq!(plain.scaling(8.0, 16), 0.5);
        let stabilised =
            config(r#"{"peft_type": "LORA", "r": 16, "lora_alpha": 8, "use_rslora": true}"#)
                .expect("sound");
        assert_eq!(stabilised.scaling(8.0, 16), 2.0);
    }

    #[test]
    fn broken_settings_are_named() {
        assert!(complaint(r#"{"r": 8}"#).contains("no peft_type"));
        assert!(complaint(r#"{"peft_type": "IA3"}"#).contains("is a IA3 adapter"));
        assert!(complaint(r#"{"fine_tune_type": "lora"}"#).contains("MLX"));
        let with = |rest: &str| complaint(&format!(r#"{{"peft_type": "LORA", {rest}}}"#));
        assert!(with(r#""lora_alpha": 8"#).contains("has no r"));
        assert!(with(r#""r": 0, "lora_alpha": 8"#).contains("sets r to 0"));
        assert!(with(r#""r": -4, "lora_alpha": 8"#).contains("sets r to -4"));
        assert!(with(r#""r": 8"#).contains("has no lora_alpha"));
        assert!(with(r#""r": 8, "lora_alpha": "x""#).contains("finite number"));
        assert!(with(r#""r": 8, "lora_alpha": 8, "use_rslora": 1"#).contains("true or false"));
        assert!(
            with(r#""r": 8, "lora_alpha": 8, "rank_pattern": {"(": 1}"#)
                .contains("invalid expression")
        );
        assert!(
            with(r#""r": 8, "lora_alpha": 8, "rank_pattern": {"q": 0}"#)
                .contains(r#"rank_pattern["q"]"#)
        );
    }

    #[test]
    fn what_would_change_the_result_is_an_obstacle() {
        let obstacles = |rest: &str, allow: &[&str]| {
            let allow: Vec<_> = allow.iter().map(|field| (*field).to_owned()).collect();
            config(&format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {rest}}}"#))
                .expect("sound")
                .obstacles(&allow)
        };
        let harmless = r#""bias": "none", "init_lora_weights": true, "eva_config": null,
            "loftq_config": {}, "use_dora": false, "target_modules": ["q"], "alpha": 16"#;
        assert_eq!(obstacles(harmless, &[]), Vec::<String>::new());
        assert!(obstacles(r#""kasa_config": {"a": 1}"#, &[])[0].contains("KaSA (kasa_config)"));
        assert!(obstacles(r#""init_lora_weights": "pissa""#, &[])[0].contains("pissa"));
        assert!(obstacles(r#""alpha": 4"#, &[])[0].contains("beside lora_alpha"));
        assert!(obstacles(r#""new_thing": 3"#, &[])[0].contains("unknown config field new_thing"));
        assert!(obstacles(r#""new_thing": 3"#, &["new_thing"]).is_empty());
        assert!(obstacles(r#""new_thing": null"#, &[]).is_empty());
    }
}
