//! Credentials: those that a caller's own function gives and renews, and whether there are any at all.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use lorafast::{Error, Result};
use object_store::CredentialProvider;
use object_store::aws::AwsCredential;
use object_store::azure::AzureCredential;
use object_store::gcp::GcpCredential;
use tokio::sync::Mutex;

use crate::address::{Address, Kind};
use crate::failure::Words;
use crate::options::Options;

/// What a provider gives: `object_store`'s keys, and until when they hold.
pub type Credentials = (BTreeMap<String, String>, Option<SystemTime>);
/// A caller's own function, which is asked again when what it gave has expired.
pub type Provider = Arc<dyn Fn() -> std::result::Result<Credentials, String> + Send + Sync>;

/// How long before their end credentials are asked for anew.
const EARLY: Duration = Duration::from_secs(60);
/// How soon the same function may be asked again, whatever it says.
const SOONEST: Duration = Duration::from_secs(1);

/// Credentials of one kind, made of what a provider gives.
pub(crate) struct Renewed<T> {
    provider: Provider,
    make: fn(&BTreeMap<String, String>) -> std::result::Result<T, String>,
    known: Mutex<Option<Known<T>>>,
}

struct Known<T> {
    credential: Arc<T>,
    asked: SystemTime,
    expiry: Option<SystemTime>,
}

impl<T> Renewed<T> {
    pub fn new(
        provider: Provider,
        make: fn(&BTreeMap<String, String>) -> std::result::Result<T, String>,
    ) -> Self {
        Self { provider, make, known: Mutex::default() }
    }
}

impl<T> Debug for Renewed<T> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Renewed")
    }
}

#[async_trait]
impl<T: Send + Sync + 'static> CredentialProvider for Renewed<T> {
    type Credential = T;

    async fn get_credential(&self) -> object_store::Result<Arc<T>> {
        let mut known = self.known.lock().await;
        let now = SystemTime::now();
        if let Some(known) = &*known {
            let holds = known.expiry.is_none_or(|expiry| now + EARLY < expiry);
            if holds || now < known.asked + SOONEST {
                return Ok(known.credential.clone());
            }
        }
        let provider = self.provider.clone();
        let given = tokio::task::spawn_blocking(move || provider()).await?;
        let made = given.and_then(|(keys, expiry)| Ok(((self.make)(&keys)?, expiry)));
        let (credential, expiry) = made.map_err(|reason| {
            Words(format!("the credential_provider gave no credentials: {reason}")).into_error()
        })?;
        let credential = Arc::new(credential);
        *known = Some(Known { credential: credential.clone(), asked: now, expiry });
        Ok(credential)
    }
}

fn first<'a>(keys: &'a BTreeMap<String, String>, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| keys.get(*name)).map(String::as_str)
}

pub(crate) fn of_aws(
    keys: &BTreeMap<String, String>,
) -> std::result::Result<AwsCredential, String> {
    let needed = |names: &[&str]| {
        first(keys, names).map(str::to_owned).ok_or_else(|| format!("it has no {}", names[0]))
    };
    Ok(AwsCredential {
        key_id: needed(&["aws_access_key_id", "access_key_id"])?,
        secret_key: needed(&["aws_secret_access_key", "secret_access_key"])?,
        token: first(keys, &["aws_session_token", "aws_token", "session_token", "token"])
            .map(str::to_owned),
    })
}

pub(crate) fn of_gcp(
    keys: &BTreeMap<String, String>,
) -> std::result::Result<GcpCredential, String> {
    let bearer = first(keys, &["bearer_token", "token"]).ok_or("it has no bearer_token")?;
    Ok(GcpCredential { bearer: bearer.to_owned() })
}

pub(crate) fn of_azure(
    keys: &BTreeMap<String, String>,
) -> std::result::Result<AzureCredential, String> {
    let bearer = first(keys, &["bearer_token", "azure_storage_token", "token"]);
    Ok(AzureCredential::BearerToken(bearer.ok_or("it has no bearer_token")?.to_owned()))
}

/// Refuses to wait for a metadata service where there is none.
///
/// # Errors
/// [`Error::Store`], with where credentials could come from.
pub(crate) fn check(address: &Address, options: &Options) -> Result<()> {
    let missing = |message: String| Err(Error::store(address.name(), message));
    match address.kind {
        Kind::S3 => {
            let given = options.is_set("aws_skip_signature")
                || options.has("aws_access_key_id") && options.has("aws_secret_access_key")
                || options.has("aws_web_identity_token_file") && options.has("aws_role_arn")
                || options.has("aws_container_credentials_relative_uri")
                || options.has("aws_container_credentials_full_uri")
                || options.has("aws_metadata_endpoint");
            let is_disabled = std::env::var("AWS_EC2_METADATA_DISABLED")
                .is_ok_and(|value| value.eq_ignore_ascii_case("true"));
            if given || !is_disabled && runs_at("amazon") {
                return Ok(());
            }
            let profile = match std::env::var_os("AWS_PROFILE") {
                Some(_) => {
                    " AWS_PROFILE is set, but files of profiles and SSO are not read: give a credential_provider that \
                     asks boto3."
                }
                None => "",
            };
            missing(format!(
                "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the same in \
                 storage_options), or give a credential_provider; of a public bucket, skip_signature=true reads \
                 without.{profile}"
            ))
        }
        Kind::Gcs => {
            let keys = [
                "google_service_account",
                "google_service_account_key",
                "google_application_credentials",
                "google_bearer_token",
            ];
            let home = std::env::var_os("HOME").map(std::path::PathBuf::from);
            let usual = ".config/gcloud/application_default_credentials.json";
            let given = options.is_set("google_skip_signature")
                || keys.iter().any(|key| options.has(key))
                || home.is_some_and(|home| home.join(usual).is_file());
            if given || runs_at("google") {
                return Ok(());
            }
            missing(
                "no credentials for Google Cloud Storage: set GOOGLE_APPLICATION_CREDENTIALS or \
                 google_service_account (a path), or give a credential_provider with a bearer_token; of a public \
                 bucket, google_skip_signature=true reads without"
                    .to_owned(),
            )
        }
        Kind::Azure => {
            let keys = [
                "azure_storage_account_key",
                "azure_storage_sas_key",
                "azure_storage_token",
                "azure_storage_client_secret",
                "azure_federated_token_file",
                "azure_msi_endpoint",
            ];
            let flags =
                ["azure_skip_signature", "azure_use_azure_cli", "azure_storage_use_emulator"];
            let given = keys.iter().any(|key| options.has(key))
                || flags.iter().any(|key| options.is_set(key));
            if given || runs_at("microsoft") {
                return Ok(());
            }
            missing(
                "no credentials for Azure: set AZURE_STORAGE_ACCOUNT_KEY, azure_storage_sas_key or a client secret \
                 (or azure_use_azure_cli=true), or give a credential_provider with a bearer_token; of a public \
                 container, azure_skip_signature=true reads without"
                    .to_owned(),
            )
        }
        Kind::Http => Ok(()),
    }
}

/// Whether this machine says that it is one of that cloud's, which has a metadata service.
fn runs_at(vendor: &str) -> bool {
    let files = [
        "/sys/class/dmi/id/sys_vendor",
        "/sys/class/dmi/id/board_vendor",
        "/sys/class/dmi/id/bios_vendor",
        "/sys/class/dmi/id/product_name",
    ];
    let says = |path: &str| {
        std::fs::read_to_string(path).is_ok_and(|text| text.to_lowercase().contains(vendor))
    };
    let is_xen = || {
        vendor == "amazon"
            && std::fs::read_to_string("/sys/hypervisor/uuid")
                .is_ok_and(|text| text.starts_with("ec2"))
    };
    files.iter().any(|path| says(path)) || is_xen()
}
