//! The quantised weights of a checkpoint, by the names that the model gives them.

use std::borrow::Cow;
use std::sync::Arc;

use indexmap::IndexMap;

use super::unsupported::UnsupportedFormat;
use super::{Quantized, Stored, bitsandbytes, fp8, mxfp4, packed};
use crate::checkpoint::Checkpoint;

/// The quantised weights of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct QuantizedWeights {
    /// By the name that the model gives the weight.
    entries: IndexMap<String, Arc<Quantized>>,
    /// Weights whose layout cannot be read, by name, with the reason.
    unreadable: IndexMap<String, String>,
    /// By the name of a tensor of codes, where that is not the weight's: the weight's.
    weights: IndexMap<String, String>,
    /// By the name of a companion: its weight.
    companions: IndexMap<String, String>,
    /// Weights in formats that are not read at all.
    unsupported: Option<UnsupportedFormat>,
}

impl QuantizedWeights {
    /// Finds every quantised weight by its companions and the config.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let mut found = Self { unsupported: UnsupportedFormat::of(checkpoint), ..Self::default() };
        for (name, location) in checkpoint.tensors() {
            let stored = Stored::under(name, checkpoint, *location);
            if found.unsupported.as_ref().is_some_and(|format| format.holds_tensor(name)) {
                continue;
            }
            let as_packed = packed::parameter(name)
                .map(|weight| (weight.to_owned(), packed::read(checkpoint, &stored, weight)));
            let renamed = as_packed.or_else(|| {
                let weight = mxfp4::parameter(checkpoint, name)?;
                let layout = mxfp4::read(checkpoint, &stored, &weight);
                Some((weight, layout))
            });
            if let Some((weight, layout)) = renamed {
                let twice = format!("is stored twice, once more as {name}");
                let is_there = checkpoint.tensor(&weight).is_some();
                found.weights.insert(name.clone(), weight.clone());
                found.add(weight, if is_there { Err(twice) } else { layout });
                continue;
            }
            let layout = match stored.tensor.dtype.name() {
                "F8_E4M3" | "F8_E5M2" => fp8::read(checkpoint, &stored),
                "I8" => bitsandbytes::read_int8(checkpoint, &stored)
                    .or_else(|| packed::read_int8(checkpoint, &stored)),
                // Packed codes can lie in a tensor of any type (quant_storage).
                _ => bitsandbytes::read_four_bit(checkpoint, &stored)
                    .or_else(|| packed::read_modelopt(checkpoint, &stored)),
            };
            if let Some(layout) = layout {
                found.add(name.clone(), layout);
            }
        }
        // A scale of 8 bits looks like a weight without one.
        let companions = &found.companions;
        found.entries.retain(|name, _| !companions.contains_key(name));
        found.unreadable.retain(|name, _| !companions.contains_key(name));
        found
    }

    fn add(&mut self, weight: String, layout: Result<Quantized, String>) {
        match layout {
            Ok(quantized) => {
                for companion in &quantized.companions {
                    self.companions.insert(companion.clone(), weight.clone());
                }
                self.entries.insert(weight, Arc::new(quantized));
            }
            Err(problem) => {
                self.unreadable.insert(weight, problem);
            }
        }
    }

    /// The same files with the tensors of codes under the names that the model gives their weights,
    /// those in formats that are not read among them, so that whoever looks for a weight finds it.
    pub fn named<'a>(&self, checkpoint: &'a Checkpoint) -> Cow<'a, Checkpoint> {
        let foreign = self.unsupported.as_ref();
        let weight_of = |name: &str| {
            let of_foreign = || foreign.and_then(|format| format.weight_of(name));
            let weight = self.weights.get(name).map(String::as_str).or_else(of_foreign)?;
            checkpoint.tensor(weight).is_none().then_some(weight)
        };
        let tensors = checkpoint.tensors();
        if !tensors.keys().any(|name| weight_of(name).is_some()) {
            return Cow::Borrowed(checkpoint);
        }
        let mut named = IndexMap::with_capacity(tensors.len());
        for (name, location) in tensors {
            named.insert(weight_of(name).unwrap_or(name).to_owned(), *location);
        }
        Cow::Owned(checkpoint.with_tensors(named))
    }

    /// The weight of that name.
    pub fn get(&self, name: &str) -> Option<&Arc<Quantized>> {
        self.entries.get(name)
    }

    /// The weight whose codes a tensor holds.
    pub fn of_codes(&self, name: &str) -> Option<&Arc<Quantized>> {
        self.entries.get(self.weight_of(name))
    }

    /// The name of the weight whose codes a tensor holds; of any other tensor its own.
    pub fn weight_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.weights.get(name).map_or(name, String::as_str)
    }

    /// All of them.
    pub fn entries(&self) -> &IndexMap<String, Arc<Quantized>> {
        &self.entries
    }

    /// The weight that a tensor accompanies.
    pub fn owner(&self, companion: &str) -> Option<&str> {
        self.companions.get(companion).map(String::as_str)
    }

    /// Formats that are not read.
    pub fn unsupported(&self) -> Option<&UnsupportedFormat> {
        self.unsupported.as_ref()
    }

    /// Why a weight cannot be read.
    pub fn problem(&self, name: &str) -> Option<&str> {
        self.unreadable.get(name).map(String::as_str)
    }

    /// The weights that cannot be read, with the reasons.
    pub fn problems(&self) -> &IndexMap<String, String> {
        &self.unreadable
    }

    /// The schemes in words, each with the number of its weights.
    pub fn schemes(&self) -> IndexMap<&str, usize> {
        let mut schemes = IndexMap::new();
        for entry in self.entries.values() {
            *schemes.entry(entry.scheme.as_str()).or_default() += 1;
        }
        schemes
    }
}
