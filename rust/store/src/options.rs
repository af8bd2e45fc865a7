//! What the user says of stores: object_store's keys, with which environment variables stand, too.

use std::collections::BTreeMap;
use std::time::Duration;

use lorafast::{Error, Result};
use object_store::aws::AmazonS3ConfigKey;
use object_store::azure::AzureConfigKey;
use object_store::gcp::GoogleConfigKey;
use object_store::{Certificate, ClientConfigKey, ClientOptions, RetryConfig};

use crate::address::{Address, Kind};

/// Keys and values, as `object_store` has them.
#[derive(Clone, Default)]
pub(crate) struct Options(BTreeMap<String, String>);

/// Keys that are this crate's own: a file of certificates, and how often a request is tried again.
const ROOT_CERTIFICATE: &str = "root_certificate";
const MAX_RETRIES: &str = "max_retries";
const RETRY_TIMEOUT: &str = "retry_timeout";
const OWN: [&str; 3] = [ROOT_CERTIFICATE, MAX_RETRIES, RETRY_TIMEOUT];
/// What stands for yes.
const YES: [&str; 5] = ["true", "1", "yes", "y", "on"];

impl Options {
    /// Those of the environment, and what the user gave, which counts more.
    ///
    /// # Errors
    /// [`Error::Argument`] for a key that no store has.
    pub fn new(given: &BTreeMap<String, String>, kind: Kind) -> Result<Self> {
        let prefix = match kind {
            Kind::S3 => "AWS_",
            Kind::Gcs => "GOOGLE_",
            Kind::Azure => "AZURE_",
            Kind::Http => "\0",
        };
        let environment = std::env::vars_os().filter_map(|(key, value)| {
            let key = key.to_str().filter(|key| key.starts_with(prefix) || is_own_of(kind, key))?;
            let known = canonical(kind, &key.to_ascii_lowercase())?;
            Some((known, value.to_str()?.to_owned()))
        });
        let mut all: BTreeMap<_, _> = environment.collect();
        for (key, value) in given {
            let lower = key.to_ascii_lowercase();
            if let Some(known) = canonical(kind, &lower) {
                all.insert(known, value.clone());
            } else if !OTHERS.iter().any(|other| canonical(*other, &lower).is_some()) {
                return Err(Error::Argument(format!(
                    "storage_options has the key '{key}', which no store knows; keys are those of object_store, as \
                     aws_access_key_id, aws_region, aws_endpoint_url, google_service_account, azure_storage_account_name"
                )));
            }
        }
        Ok(Self(all))
    }

    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| !value.is_empty())
    }

    /// Whether a key says yes.
    pub fn is_set(&self, key: &str) -> bool {
        self.get(key).is_some_and(|value| YES.contains(&value.to_ascii_lowercase().as_str()))
    }

    pub fn insert(&mut self, key: &str, value: impl Into<String>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// The keys that the store's own builder takes.
    pub fn for_builder(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .filter(|(key, _)| !OWN.contains(&key.as_str()))
            .map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// How often a request is tried again, and for how long.
    ///
    /// # Errors
    /// [`Error::Argument`] for what is no number.
    pub fn retries(&self) -> Result<RetryConfig> {
        let mut retries = RetryConfig::default();
        if let Some(value) = self.get(MAX_RETRIES) {
            retries.max_retries = value.parse().map_err(|_| no_number(MAX_RETRIES))?;
        }
        if let Some(value) = self.get(RETRY_TIMEOUT) {
            let seconds: f64 =
                value.trim_end_matches('s').parse().map_err(|_| no_number(RETRY_TIMEOUT))?;
            retries.retry_timeout =
                Duration::try_from_secs_f64(seconds).map_err(|_| no_number(RETRY_TIMEOUT))?;
        }
        Ok(retries)
    }

    /// What the client begins with, before the builder's keys are added.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Argument`] if the file of certificates is none.
    pub fn client(&self, address: &Address) -> Result<ClientOptions> {
        let endpoints =
            ["aws_endpoint_url_s3", "aws_endpoint", "azure_storage_endpoint", "google_base_url"];
        let endpoint = endpoints.iter().find_map(|key| self.get(key)).unwrap_or(&address.root);
        // Who writes http:// of a web server means it; what keys go to is another thing.
        let is_meant = endpoint.starts_with("http://")
            && (address.kind == Kind::Http || Address::is_loopback(endpoint));
        let mut client = ClientOptions::new();
        if is_meant {
            client = client.with_allow_http(true);
        }
        if let Some(path) = self.get(ROOT_CERTIFICATE) {
            let content = std::fs::read(path).map_err(|error| Error::io(path, error))?;
            let bundle = Certificate::from_pem_bundle(&content).map_err(|_| {
                Error::Argument(format!(
                    "root_certificate: {path} holds no certificates in PEM form"
                ))
            })?;
            client = bundle.into_iter().fold(client, ClientOptions::with_root_certificate);
        }
        Ok(client)
    }
}

const OTHERS: [Kind; 4] = [Kind::S3, Kind::Gcs, Kind::Azure, Kind::Http];

/// Environment variables that begin otherwise.
fn is_own_of(kind: Kind, key: &str) -> bool {
    kind == Kind::Gcs && key == "SERVICE_ACCOUNT"
}

fn no_number(key: &str) -> Error {
    Error::Argument(format!("storage_options: {key} is a number"))
}

/// The one name of a key that a store knows under several.
fn canonical(kind: Kind, key: &str) -> Option<String> {
    if OWN.contains(&key) {
        return Some(key.to_owned());
    }
    let known = match kind {
        Kind::S3 => key.parse::<AmazonS3ConfigKey>().ok()?.as_ref().to_owned(),
        Kind::Gcs => key.parse::<GoogleConfigKey>().ok()?.as_ref().to_owned(),
        Kind::Azure => key.parse::<AzureConfigKey>().ok()?.as_ref().to_owned(),
        Kind::Http => key.parse::<ClientConfigKey>().ok()?.as_ref().to_owned(),
    };
    Some(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn keys_have_one_name_and_unknown_ones_are_told() {
        let options = Options::new(
            &given(&[("endpoint", "http://127.0.0.1:1"), ("google_bucket", "x")]),
            Kind::S3,
        );
        let options = options.expect("known keys");
        assert_eq!(options.get("aws_endpoint"), Some("http://127.0.0.1:1"));
        let error = Options::new(&given(&[("aws_regoin", "x")]), Kind::S3).err().expect("unknown");
        assert!(error.to_string().contains("aws_regoin"));
        let retries =
            Options::new(&given(&[("max_retries", "3"), ("retry_timeout", "2.5")]), Kind::Http);
        let retries = retries.expect("known").retries().expect("numbers");
        assert_eq!((retries.max_retries, retries.retry_timeout), (3, Duration::from_millis(2500)));
    }
}
