"""The provider on Redis 7 or Valkey."""

from shared.providers.redis.provider import RedisProvider

__all__ = ["RedisProvider"]
