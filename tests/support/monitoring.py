"""The queries by which the system that this one succeeds was monitored, unchanged."""

QUEUE_STATISTICS = """
SELECT
    queue_name,
    status,
    COUNT(*) as count,
    AVG(TIMESTAMPDIFF(SECOND, created_at, processed_at)) as avg_processing_time
FROM queue_messages
WHERE created_at >= DATE_SUB(NOW(), INTERVAL 1 HOUR)
GROUP BY queue_name, status;
"""

FAILED_MESSAGES = """
SELECT
    id,
    queue_name,
    message_type,
    error_message,
    retry_count,
    created_at
FROM queue_messages
WHERE status = 'failed'
ORDER BY created_at DESC;
"""

PERFORMANCE = """
SELECT
    message_type,
    AVG(TIMESTAMPDIFF(SECOND, created_at, processed_at)) as avg_time,
    MAX(TIMESTAMPDIFF(SECOND, created_at, processed_at)) as max_time,
    COUNT(*) as total_messages
FROM queue_messages
WHERE status = 'completed'
GROUP BY message_type;
"""
