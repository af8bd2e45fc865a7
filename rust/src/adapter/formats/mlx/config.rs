//! `adapter_config.json` as MLX writes it: the settings of the whole training, of which few matter.

use std::path::Path;

use serde_json::{Map, Value};

use crate::adapter::coverage::{PartUse, Usage};
use crate::adapter::format::GivenScale;
use crate::error::{Error, Result};
use crate::limits;

/// What of the model was trained (`fine_tune_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trained {
    /// Factors.
    Lora,
    /// Factors and magnitudes.
    Dora,
    /// Whole weights.
    Full,
}

/// A read and checked config.
#[derive(Debug, Clone)]
pub(super) struct MlxConfig {
    pub raw: Map<String, Value>,
    /// Nothing, where no config tells.
    pub trained: Option<Trained>,
    /// The rank of every module.
    pub rank: Option<u64>,
    /// The factor on every product, where whole weights are not all there is.
    pub scale: Option<f64>,
    /// What would be the scale of a config that is not there.
    pub given: Option<GivenScale>,
    /// How the scale was found, where that is not the usual way.
    pub note: Option<String>,
}

/// Whether a config is one of MLX's, by its fields.
pub(super) fn is_of_mlx(fields: &Map<String, Value>) -> bool {
    let has = |name: &str| fields.contains_key(name);
    !has("peft_type")
        && (has("fine_tune_type")
            || has("lora_parameters")
            || has("num_layers")
            || has("lora_layers")
            || has("rank") && has("alpha"))
}

impl MlxConfig {
    /// Checks what an `adapter_config.json` of that path holds.
    ///
    /// # Errors
    /// [`Error::Adapter`] if it is broken or lacks the scale, [`Error::Unsupported`] if it is of another
    /// kind of training.
    pub fn parse(path: &Path, text: &[u8]) -> Result<Self> {
        let broken = |message: String| Error::adapter(path, message);
        let raw: Map<String, Value> = serde_json::from_slice(text)
            .map_err(|error| broken(format!("is not a JSON object: {error}")))?;
        if raw.contains_key("peft_type") {
            return Err(broken(
                "is a config of PEFT's (peft_type), but the weights beside it are MLX's; put the \
                 config there that was saved with them"
                    .into(),
            ));
        }
        let is_dora = raw.get("use_dora").and_then(Value::as_bool) == Some(true);
        let trained = match raw.get("fine_tune_type") {
            None | Some(Value::Null) if is_dora => Trained::Dora,
            None | Some(Value::Null) => Trained::Lora,
            Some(Value::String(name)) if name == "lora" => Trained::Lora,
            Some(Value::String(name)) if name == "dora" => Trained::Dora,
            Some(Value::String(name)) if name == "full" => Trained::Full,
            Some(other) => {
                return Err(Error::unsupported(
                    path,
                    format!(
                        "sets fine_tune_type to {other}; what MLX trains and can be merged is lora, \
                         dora or full"
                    ),
                ));
            }
        };
        let mut config =
            Self { raw, trained: Some(trained), rank: None, scale: None, given: None, note: None };
        if trained != Trained::Full {
            config.read_scale().map_err(broken)?;
        }
        Ok(config)
    }

    /// What stands for a config that is not there.
    pub fn missing(given: GivenScale) -> Self {
        let given = Some(given);
        Self { raw: Map::new(), trained: None, rank: None, scale: None, given, note: None }
    }

    fn read_scale(&mut self) -> Result<(), String> {
        let (at, parameters) = match self.raw.get("lora_parameters") {
            Some(Value::Object(parameters)) => ("lora_parameters.", parameters),
            None | Some(Value::Null) => ("", &self.raw),
            Some(other) => {
                return Err(format!(
                    "sets lora_parameters to {other}; it has the rank and the scale"
                ));
            }
        };
        let number = |field: &str| match parameters.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(format!("sets {at}{field} to {value}; it is a finite number")),
            },
        };
        self.rank = match parameters.get("rank") {
            None | Some(Value::Null) => None,
            Some(value) => match value.as_u64() {
                Some(rank @ 1..=limits::RANK) => Some(rank),
                _ => {
                    return Err(format!(
                        "sets {at}rank to {value}; a rank is a whole number from 1 to {}",
                        limits::RANK
                    ));
                }
            },
        };
        let (scale, alpha) = (number("scale")?, number("alpha")?);
        let is_early = !self.raw.contains_key("fine_tune_type");
        self.scale = Some(match (scale, alpha, self.rank) {
            // Releases before fine_tune_type multiplied the two.
            (Some(scale), Some(alpha), Some(rank)) if is_early => {
                self.note = Some(format!(
                    "its config has an alpha beside the scale, as early releases of mlx-lm wrote \
                     it, which multiplied by scale · alpha / rank = {scale} · {alpha} / {rank}; \
                     later ones read such a file with the scale alone"
                ));
                scale * alpha / rank as f64
            }
            (Some(scale), ..) => scale,
            // mlx-vlm's alpha is the factor itself.
            (None, Some(alpha), _) if at.is_empty() => alpha,
            (None, alpha, _) => {
                let beside = match alpha {
                    Some(_) => "; the alpha that it has is no setting of MLX's LoRA",
                    None => "",
                };
                return Err(format!(
                    "has no scale (lora_parameters.scale), by which MLX multiplies every \
                     update{beside}; write the scale that it was trained with there (mlx-lm's own \
                     default is 20)"
                ));
            }
        });
        Ok(())
    }

    /// The factor on the product of a module of that rank.
    pub fn scaling(&self, rank: u64) -> f64 {
        match (self.scale, self.given) {
            (Some(scale), _) | (None, Some(GivenScale::Factor(scale))) => scale,
            (None, Some(GivenScale::Alpha(alpha))) => alpha / rank as f64,
            _ => f64::NAN,
        }
    }

    /// The base that was trained, by the name that the config gives it.
    pub fn base(&self) -> Option<String> {
        let base = self.raw.get("model").or_else(|| self.raw.get("model_path"))?.as_str()?.trim();
        Some(base).filter(|base| !base.is_empty()).map(str::to_owned)
    }

    /// What becomes of each field.
    pub fn fields(&self) -> Vec<PartUse> {
        let used = |name: &str| match name {
            "fine_tune_type" | "use_dora" => Some("what was trained"),
            "lora_parameters" | "rank" | "alpha" | "scale" => Some("ranks and scale"),
            "model" | "model_path" => Some("the base that was trained"),
            _ => None,
        };
        let fields = self.raw.keys().map(|name| match used(name) {
            Some(reason) => PartUse::new(name.as_str(), (Usage::Used, reason)),
            None => PartUse::new(
                name.as_str(),
                (Usage::NotNeeded, "a setting of the training; the tensors tell what it trained"),
            ),
        });
        fields.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<MlxConfig> {
        MlxConfig::parse(Path::new("adapter_config.json"), text.as_bytes())
    }

    #[test]
    fn the_scale_is_what_each_release_multiplied_by() {
        let scale = |text: &str| parse(text).expect("sound").scale;
        let of = |fields: &str| format!(r#"{{"lora_parameters": {{{fields}}}}}"#);
        assert_eq!(scale(&of(r#""rank": 8, "scale": 20.0"#)), Some(20.0));
        assert_eq!(scale(&of(r#""rank": 8, "scale": 10.0, "alpha": 16"#)), Some(20.0));
        let later = r#"{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 10.0, "alpha": 16}}"#;
        assert_eq!(scale(later), Some(10.0));
        assert_eq!(scale(r#"{"rank": 10, "alpha": 0.1}"#), Some(0.1));
        assert_eq!(scale(r#"{"fine_tune_type": "full", "lora_parameters": null}"#), None);
    }

    #[test]
    fn what_lacks_the_scale_is_refused() {
        let complaint = |text: &str| parse(text).expect_err("refused").to_string();
        assert!(complaint(r#"{"lora_parameters": {"rank": 8}}"#).contains("has no scale"));
        let alpha = complaint(r#"{"lora_parameters": {"rank": 8, "alpha": 16}}"#);
        assert!(alpha.contains("no setting of MLX's"), "{alpha}");
        assert!(complaint(r#"{"lora_parameters": {"rank": 0, "scale": 1}}"#).contains("rank to 0"));
        assert!(complaint(r#"{"lora_parameters": {"scale": "2"}}"#).contains("finite number"));
        assert!(complaint(r#"{"lora_parameters": 3}"#).contains("lora_parameters to 3"));
        assert!(complaint(r#"{"fine_tune_type": "prefix"}"#).contains("\"prefix\""));
        assert!(complaint(r#"{"peft_type": "LORA"}"#).contains("PEFT's"));
        assert!(complaint("[").contains("JSON object"));
    }
}
