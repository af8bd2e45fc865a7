//! What a file's metadata says of scales: diffusers' copies of PEFT's configs, and the alphas that other
//! trainers write under names of their own.

use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::adapter::coverage::PartUse;
use crate::adapter::formats::parts::{DefaultScale, ModuleParts, Part, ScaleRule};
use crate::adapter::formats::peft::config::PeftConfig;
use crate::adapter::semantics::{Initialization, Semantics};
use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// Where diffusers keeps the config of each component, as a JSON text.
const CONFIGS: &str = "lora_adapter_metadata";
/// What other trainers call the alpha of all modules, or of a component's behind its name.
const ALPHAS: [&str; 3] = ["lora_alpha", "network_alpha", "alpha"];
/// What PEFT puts between a component and the names of its modules.
const PEFT: &str = "base_model.model.";

/// What the metadata says of scales.
pub(super) struct Scales {
    file: PathBuf,
    /// PEFT's config of each component; under an empty name that of all.
    configs: IndexMap<String, PeftConfig>,
    /// Alphas by their keys in the metadata, with the component that each is of.
    alphas: Vec<(String, String, f64)>,
}

/// A scale that metadata gives a module.
struct Told<'a> {
    /// The metadata's key.
    key: &'a str,
    alpha: f64,
    scaling: f64,
}

impl Scales {
    /// By the metadata of a file.
    ///
    /// # Errors
    /// [`Error::Adapter`] if it is damaged, [`Error::Unsupported`] if it describes something other
    /// than a LoRA.
    pub fn read(file: &Path, metadata: &IndexMap<String, String>) -> Result<Self> {
        let mut alphas = Vec::new();
        for (key, text) in metadata {
            let (component, field) = key.rsplit_once('.').unwrap_or(("", key));
            if !ALPHAS.contains(&field) || text == "None" {
                continue;
            }
            let alpha = text.trim().parse::<f64>().ok().filter(|alpha| alpha.is_finite());
            let alpha = alpha.filter(|alpha| *alpha != 0.0).ok_or_else(|| {
                let problem = format!(
                    "its metadata sets {key} to {text:?}; an alpha is a finite number other than 0"
                );
                Error::adapter(file, problem)
            })?;
            alphas.push((component.to_owned(), key.clone(), alpha));
        }
        let configs = match metadata.get(CONFIGS) {
            Some(text) => configs(file, text)?,
            None => IndexMap::new(),
        };
        Ok(Self { file: file.to_path_buf(), configs, alphas })
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.configs.is_empty() && self.alphas.is_empty()
    }

    /// What becomes of each field of the components' configs.
    pub fn fields(&self) -> Vec<PartUse> {
        let of = |(component, config): (&String, &PeftConfig)| {
            let named = config.uses().into_iter().map(|used| match component.as_str() {
                "" => used,
                component => PartUse { name: format!("{component}.{}", used.name), ..used },
            });
            named.collect::<Vec<_>>()
        };
        self.configs.iter().flat_map(of).collect()
    }

    /// What the factors mean, as far as the configs say it.
    pub fn semantics(&self) -> Semantics {
        let mut all = Semantics::default();
        for config in self.configs.values() {
            let own = config.semantics();
            if own.initialization != Initialization::Plain {
                all.initialization = own.initialization;
            }
            all.layer_replication = all.layer_replication.or(own.layer_replication);
            all.rank_stabilized |= own.rank_stabilized;
            all.base = all.base.or(own.base);
        }
        all
    }

    /// Where the scale of a module comes from; `fallback` where neither its alpha nor the metadata
    /// tells.
    ///
    /// # Errors
    /// [`Error::Adapter`] if two that tell it disagree, or if the metadata has another rank.
    pub fn rule(
        &self,
        module: &str,
        parts: &ModuleParts,
        fallback: DefaultScale,
    ) -> Result<ScaleRule> {
        let rule = |default| ScaleRule { default, ..ScaleRule::default() };
        // What is no product of two matrices has its alpha beside it.
        let Some(down) = parts.get(Part::Down).filter(|down| !down.shape.is_empty()) else {
            return Ok(rule(fallback));
        };
        let rank = down.shape[0].max(1);
        let told = self.told(module, rank)?;
        if let Some(alpha) = parts.get(Part::Alpha).filter(|_| parts.get(Part::Scale).is_none()) {
            for told in &told {
                self.check_alpha(alpha, rank, told)?;
            }
        }
        let Some(first) = told.first() else { return Ok(rule(fallback)) };
        if let Some(other) = told.iter().find(|other| !is_near(other.scaling, first.scaling, 1e-6))
        {
            return Err(Error::adapter(
                &self.file,
                format!(
                    "its metadata has two scales of {module}: {} by {} and {} by {}; keep the one that was \
                     trained",
                    first.scaling, first.key, other.scaling, other.key
                ),
            ));
        }
        Ok(rule(DefaultScale::Factor { scaling: first.scaling, alpha: first.alpha }))
    }

    /// What the metadata says of a module, each time that it does.
    fn told(&self, module: &str, rank: u64) -> Result<Vec<Told<'_>>> {
        let mut told = Vec::new();
        for (component, config) in &self.configs {
            let Some(path) = within(module, component) else { continue };
            let expected = config.rank_of(path, path)?;
            if expected != rank {
                return Err(Error::adapter(
                    &self.file,
                    format!(
                        "its metadata ({CONFIGS}) has rank {expected} for {module}, whose factors have \
                         {rank}; the two do not belong together"
                    ),
                ));
            }
            let alpha = config.alpha_of(path, path)?;
            told.push(Told { key: CONFIGS, alpha, scaling: config.scaling(alpha, rank) });
        }
        for (component, key, alpha) in &self.alphas {
            if within(module, component).is_some() {
                told.push(Told { key, alpha: *alpha, scaling: alpha / rank as f64 });
            }
        }
        Ok(told)
    }

    /// Refuses an alpha that is stored beside the factors and is another one than the metadata's.
    fn check_alpha(&self, alpha: &Tensor, rank: u64, told: &Told<'_>) -> Result<()> {
        // One of more elements or of another type is the parts' to refuse.
        if alpha.elements() != 1 || !alpha.dtype.is_mergeable() {
            return Ok(());
        }
        let stored = alpha.read_f64()?[0];
        // As far as its type holds it.
        let tolerance = match alpha.dtype {
            Dtype::Bf16 => 1.0 / 256.0,
            Dtype::F16 => 1.0 / 2048.0,
            _ => 1e-6,
        };
        if is_near(stored / rank as f64, told.scaling, tolerance) {
            return Ok(());
        }
        let expected = told.scaling * rank as f64;
        Err(Error::adapter(
            &self.file,
            format!(
                "{} is {stored}, but its metadata ({}) makes it {expected}; keep the one that was trained",
                alpha.name, told.key
            ),
        ))
    }
}

fn is_near(x: f64, y: f64, tolerance: f64) -> bool {
    (x - y).abs() <= tolerance * y.abs()
}

/// A module's path within a component; `None` where it is another's. An empty component is all.
fn within<'a>(module: &'a str, component: &str) -> Option<&'a str> {
    let path = match component {
        "" => module,
        component => module.strip_prefix(component)?.strip_prefix('.')?,
    };
    Some(path.strip_prefix(PEFT).unwrap_or(path))
}

/// The config of each component.
fn configs(file: &Path, text: &str) -> Result<IndexMap<String, PeftConfig>> {
    let broken = |error: serde_json::Error| {
        Error::adapter(file, format!("its metadata's {CONFIGS} is no JSON object: {error}"))
    };
    let all: Map<String, Value> = serde_json::from_str(text).map_err(broken)?;
    let mut fields = IndexMap::<String, Map<String, Value>>::new();
    for (key, value) in all {
        let (component, field) = key.rsplit_once('.').unwrap_or(("", &key));
        fields.entry(component.to_owned()).or_default().insert(field.to_owned(), value);
    }
    let mut configs = IndexMap::with_capacity(fields.len());
    for (component, mut fields) in fields {
        fields.entry("peft_type").or_insert_with(|| "LORA".into());
        let text = serde_json::to_vec(&fields).expect("plain data");
        configs.insert(component, PeftConfig::parse(file, &text)?);
    }
    Ok(configs)
}
